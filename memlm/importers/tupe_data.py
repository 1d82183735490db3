"""Data that the TUPE authors' preprocessing made: dictionaries, blocks, GLUE pairs.

Their dictionaries have three more special words than fairseq's (``<file>``, ``<email>``, ``<url>``
at 4 to 6) and get ``<mask>`` last. GLUE folders hold ``input0``, ``input1`` and ``label``; a sample
is

    <s> input0 </s> </s> input1 </s>                cut at the end to the longest length

and its class the rank of its label by frequency in training, which ``label/dict.txt`` keeps.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError
from memlm.formats.binarised import read_lines
from memlm.models.tupe.tokenizer import TUPE_SPECIALS, read_tupe_dictionary

_BEGIN, _SEPARATOR = 0, 2


class LabelledTokens(NamedTuple):
    """Samples of a GLUE task.

    Attributes:
        tokens: ``(time,)`` int64 of every sample.
        labels: ``(samples,)`` int64 classes, or float64 numbers of a regression.
        names: of the classes in order; empty for a regression.
    """

    tokens: list[NDArray[np.int64]]
    labels: NDArray[np.number]
    names: tuple[str, ...]


def read_sentences(prefix: str | Path) -> list[NDArray[np.int64]]:
    """The binarised lines at ``prefix`` (of ``.bin`` and ``.idx``), one row of tokens each."""
    lines = read_lines(prefix)
    pieces = np.split(np.asarray(lines.tokens, np.int64), np.cumsum(lines.sizes)[:-1])
    return pieces if len(lines.sizes) else []


def read_glue_folder(
    folder: str | Path, split: str = "train", *, max_length: int = 512
) -> LabelledTokens:
    """Read one split of a binarised GLUE task.

    Args:
        folder: with ``input0``, ``label`` and, for pairs, ``input1``.
        split: ``train``, ``valid``, ``valid1``, ...
        max_length: tokens of a sample; the rest is cut, final ``</s>`` included.

    Raises:
        CorruptStoreError: if a file is missing or damaged.
        InputError: if inputs and labels are not equally many, or a label is not a number.
    """
    folder = Path(folder)
    first = read_sentences(folder / "input0" / split)
    rows = [np.concatenate([[_BEGIN], line]) for line in first]
    if (folder / "input1").is_dir():
        second = read_sentences(folder / "input1" / split)
        check(
            len(first) == len(second),
            f"input0 and input1 of {folder} must be equally many, got {len(first)} and "
            f"{len(second)}",
        )
        rows = [
            np.concatenate([row, [_SEPARATOR], line])
            for row, line in zip(rows, second, strict=True)
        ]
    labels, names = _labels(folder / "label", split)
    check(
        len(labels) == len(rows),
        f"every sample of {folder} must have a label, got {len(rows)} and {len(labels)}",
    )
    return LabelledTokens([row[:max_length].astype(np.int64) for row in rows], labels, names)


def _labels(folder: Path, split: str) -> tuple[NDArray[np.number], tuple[str, ...]]:
    numbers = folder / f"{split}.label"
    if numbers.is_file():
        return _numbers(numbers), ()
    words = read_tupe_dictionary(folder, mask=False).words[len(TUPE_SPECIALS) :]
    names = tuple(word for word in words if not word.startswith("madeupword"))
    classes = np.array([line[0] for line in read_sentences(folder / split)], np.int64)
    classes = classes - len(TUPE_SPECIALS)
    if len(classes) and (classes.min() < 0 or classes.max() >= len(names)):
        raise CorruptStoreError(
            f"labels of {folder / split} must be among {', '.join(names)}, got an unknown label"
        )
    return classes, names


def _numbers(path: Path) -> NDArray[np.float64]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(float(line))
        except ValueError as error:
            raise CorruptStoreError(
                f"line {number} of {path} must be a number, got {line!r}"
            ) from error
    return np.array(found)
