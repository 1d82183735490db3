"""The tasks of GLUE (Wang et al. 2019): where texts and labels are, what is measured.

Read from the official tab-separated files, compressed or not (columns by number, since headers
differ), from a folder that ``datasets`` saved, or from the Hub under the task's name in
``nyu-mll/glue``. Classes are in GLUE's order. The TUPE authors' code numbers them by their
frequency in training instead, the most frequent first; ``by_frequency`` does that. Test splits have
no labels; what a model says of them is written as GLUE's server reads it.
"""

import gzip
import lzma
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.files import write_atomic


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: as in GLUE.
        fields: names of the text columns in ``datasets``, one or two.
        columns: their places in a line of the files, from 0.
        label_column: place of the label; -1 the last; None: there is none.
        classes: names in order; empty for a regression.
        metrics: first the one that results are compared by.
        epochs: of the published protocol (Ke et al. 2021, appendix).
        header: whether the files begin with a line of names.
        held_out: splits that are evaluated.
        width: fields of a line, or None; other lines are dropped.
    """

    name: str
    fields: tuple[str, ...]
    columns: tuple[int, ...]
    label_column: int | None
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    epochs: int = 10
    header: bool = True
    held_out: tuple[str, ...] = ("validation",)
    width: int | None = None

    @property
    def test(self) -> tuple[str, ...]:
        """The splits without labels, one per split that is evaluated."""
        return tuple(
            split.replace("validation", "test") for split in self.held_out if "validation" in split
        )

    @property
    def num_labels(self) -> int:
        """Outputs of a model; 1 for a regression."""
        return len(self.classes) or 1


Texts = tuple[str, ...]
_PAIR = ("sentence1", "sentence2")
_YES_NO = ("0", "1")
_ENTAILED = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")
_BOTH = ("validation_matched", "validation_mismatched")
_F1 = ("accuracy", "f1")

TASKS: dict[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), (3,), 1, _YES_NO, ("matthews",), header=False),
        GlueTask("sst2", ("sentence",), (0,), 1, _YES_NO),
        GlueTask("mrpc", _PAIR, (3, 4), 0, _YES_NO, _F1),
        GlueTask("qqp", ("question1", "question2"), (3, 4), 5, _YES_NO, _F1, 5, width=6),
        GlueTask("stsb", _PAIR, (7, 8), 9, (), ("pearson", "spearman")),
        GlueTask("mnli", ("premise", "hypothesis"), (8, 9), -1, _MNLI, epochs=5, held_out=_BOTH),
        GlueTask("qnli", ("question", "sentence"), (1, 2), 3, _ENTAILED, epochs=5),
        GlueTask("rte", _PAIR, (1, 2), 3, _ENTAILED),
        GlueTask("wnli", _PAIR, (1, 2), 3, _YES_NO),
    )
}
_FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "validation_matched": "dev_matched.tsv",
    "validation_mismatched": "dev_mismatched.tsv",
    "test": "test.tsv",
    "test_matched": "test_matched.tsv",
    "test_mismatched": "test_mismatched.tsv",
}
_BEFORE_GLUE = {  # STS-B, as its authors give it
    "train": "sts-train.csv",
    "validation": "sts-dev.csv",
    "test": "sts-test.csv",
}
_TEST_COLUMNS = {"cola": (1,), "sst2": (1,), "qqp": (1, 2)}  # the others: as elsewhere
_TITLES = {
    "cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "qqp": "QQP", "stsb": "STS-B", "mnli": "MNLI",
    "qnli": "QNLI", "rte": "RTE", "wnli": "WNLI",
}  # fmt: skip
_HIGHEST_SIMILARITY = 5.0  # of STS-B; models predict a share of it


class Samples(NamedTuple):
    """One split of a task.

    Attributes:
        texts: per sample one or two texts.
        labels: ``(samples,)`` int64 classes, or float64 similarities from 0 to 1.
    """

    texts: list[Texts]
    labels: NDArray[np.number]


def glue_task(name: str) -> GlueTask:
    """The task of a name, in any of its usual spellings.

    Raises:
        InputError: if there is none.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    check(plain in TASKS, f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[plain]


def read_glue(task: GlueTask, source: str | Path | Mapping[str, Any], split: str) -> Samples:
    """Read one split.

    Args:
        task: from `glue_task`.
        source: folder of the official files, folder that ``datasets`` saved, a mapping from splits
            to rows, or the name of a data set on the Hub with the task as its configuration.
        split: ``train`` or one of ``task.held_out``.

    Raises:
        InputError: if the split is missing or empty, or a label is none of the task's.
    """
    rows = _rows(task, source, split)
    return Samples([texts for texts, _ in rows], _labels(task, [label for _, label in rows]))


def read_test(task: GlueTask, source: str | Path | Mapping[str, Any], split: str) -> list[Texts]:
    """The texts of a split without labels: one of ``task.test``, as `read_glue` reads the others.

    Raises:
        InputError: if the split is missing or empty.
    """
    return [texts for texts, _ in _rows(task, source, split)]


def predictions_name(task: GlueTask, split: str) -> str:
    """GLUE's name for the predictions of a test split, such as ``MNLI-m.tsv``."""
    ending = {"test_matched": "-m", "test_mismatched": "-mm"}.get(split, "")
    return f"{_TITLES.get(task.name, task.name)}{ending}.tsv"


def write_predictions(
    path: str | Path, predicted: NDArray[np.number], classes: Sequence[str]
) -> None:
    """Write what a model says of a test split as GLUE's server reads it: ``index  prediction``.

    Args:
        path: file to write.
        predicted: ``(samples,)`` numbers of classes, or similarities from 0 to 1.
        classes: their names in the order of the numbers; none for a regression, whose similarities
            are written from 0 to 5.
    """
    said = (
        [classes[int(one)] for one in predicted]
        if classes
        else [f"{one:.3f}" for one in np.clip(predicted, 0, 1) * _HIGHEST_SIMILARITY]
    )
    lines = ["index\tprediction", *(f"{number}\t{one}" for number, one in enumerate(said))]
    write_atomic(Path(path), lambda file: file.write("\n".join([*lines, ""]).encode()))


def by_frequency(labels: NDArray[np.number]) -> NDArray[np.int64]:
    """The TUPE authors' order of classes: the number that each old class gets.

    Args:
        labels: ``(samples,)`` classes of the training split.

    Returns:
        ``(classes,)``: rank by falling frequency, equal ones in their old order.
    """
    counted = Counter(labels.tolist())
    order = sorted(counted, key=lambda label: (-counted[label], label))
    ranks = np.zeros(max(counted) + 1, np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _rows(
    task: GlueTask, source: str | Path | Mapping[str, Any], split: str
) -> list[tuple[Texts, Any]]:
    if isinstance(source, Mapping):
        rows = _from_rows(task, source, split)
    elif _file(task, Path(source), "train") is not None:
        found = _file(task, Path(source), split)
        if found is None:
            raise InputError(f"{source} must hold {_FILES[split]} for split {split!r}")
        rows = list(_from_file(*found))
    else:
        rows = _from_rows(task, _datasets(task, str(source)), split)
    check(len(rows) > 0, f"split {split!r} of {task.name} must have samples, got none")
    return rows


def _file(task: GlueTask, folder: Path, split: str) -> tuple[GlueTask, Path] | None:
    """The file of a split and how its lines are laid out."""
    layout = task
    if split in task.test:
        columns = _TEST_COLUMNS.get(task.name, task.columns)
        layout = replace(task, columns=columns, label_column=None, header=True, width=None)
    layouts = [(layout, _FILES[split])]
    if task.name == "stsb":
        label = None if split in task.test else 4
        before = replace(task, columns=(5, 6), label_column=label, header=False)
        layouts.append((before, _BEFORE_GLUE[split]))
    for layout, name in layouts:
        for path in (folder / name, folder / f"{name}.xz", folder / f"{name}.gz"):
            if path.is_file():
                return layout, path
    return None


def _from_file(task: GlueTask, path: Path) -> Iterable[tuple[Texts, str | None]]:
    openers = {".xz": lzma.open, ".gz": gzip.open}
    with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    for number, line in enumerate(lines):
        fields = line.rstrip("\r").split("\t")
        if (number == 0 and task.header) or not line.strip():
            continue
        if task.width is not None and len(fields) != task.width:
            continue
        place = task.label_column
        last = max(task.columns) if place is None else max(*task.columns, place)
        check(
            len(fields) > last,
            f"line {number + 1} of {path} must have at least {last + 1} fields, got {len(fields)}",
        )
        label = None if place is None else fields[place]
        yield tuple(fields[column] for column in task.columns), label


def _from_rows(task: GlueTask, splits: Mapping[str, Any], split: str) -> list[tuple[Texts, Any]]:
    check(split in splits, f"{task.name} must have a split {split!r}, got {', '.join(splits)}")
    rows = splits[split]
    label = () if split in task.test else ("label",)
    for name in (*task.fields, *label):
        check(
            len(rows) == 0 or name in rows[0],
            f"rows of {task.name} must have the field {name!r}, got {', '.join(rows[0])}"
            if len(rows)
            else "",
        )
    return [
        (tuple(row[name] for name in task.fields), row["label"] if label else None) for row in rows
    ]


def _datasets(task: GlueTask, source: str) -> Mapping[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded: Any = (
            datasets.load_from_disk(source)
            if Path(source).is_dir()
            else datasets.load_dataset(source, task.name)
        )
    except (OSError, ValueError, DatasetsError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise InputError(
            f"{source} must be a folder with {_FILES['train']}, a folder that datasets saved, or "
            f"the name of a data set on the Hub, but is none that can be read ({said[0]})"
        ) from error
    check(
        isinstance(loaded, Mapping),
        f"{source} must hold several splits, got a single data set",
    )
    return loaded


def _labels(task: GlueTask, labels: list[Any]) -> NDArray[np.number]:
    if not task.classes:
        try:
            return np.array([float(label) for label in labels]) / _HIGHEST_SIMILARITY
        except ValueError as error:
            raise InputError(f"labels of {task.name} must be numbers: {error}") from error
    known = {name: number for number, name in enumerate(task.classes)}
    numbers = []
    for label in labels:
        number = label if isinstance(label, int) else known.get(str(label), -1)
        check(
            0 <= number < len(known),
            f"a label of {task.name} must be one of {', '.join(known)}, got {label!r}",
        )
        numbers.append(number)
    return np.array(numbers, np.int64)
