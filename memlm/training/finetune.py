"""Fine-tune an encoder on a task: every learning rate with every seed, the best median.

One run: the sequence classifier (any of transformers) is trained on the common loop, then predicts
the held-out splits, and the metrics are of all samples of a split. The grid can be stopped at any
time: a run that has its ``result.json`` is not repeated.

    OUT/rate-2e-05-seed-1/result.json    one run
    OUT/table.json                       medians over seeds; the best rate by the first metric
    OUT/CoLA.tsv                         test predictions of that rate's best run, if asked for
"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.files import link_or_copy, read_json, write_json
from memlm.core.randomness import random_state_kept
from memlm.data.glue import (
    GlueTask,
    Samples,
    by_frequency,
    glue_task,
    predictions_name,
    read_glue,
    read_test,
    write_predictions,
)
from memlm.evaluation.glue import score
from memlm.models.fingerprint import model_hash
from memlm.training.config import RunConfig
from memlm.training.finetune_config import FinetuneConfig
from memlm.training.folder import open_run
from memlm.training.loop import on_cpu, train
from memlm.training.model_loss import ModelLoss
from memlm.training.order import InTurn

_RESULT, _TABLE = "result.json", "table.json"

ModelMaker = Callable[[int], PreTrainedModel]


class LabelledSamples(NamedTuple):
    """Tokenised samples.

    Attributes:
        tokens: per sample its ids.
        labels: ``(samples,)`` classes or numbers.
    """

    tokens: list[list[int]]
    labels: NDArray[np.number]


def finetune(
    make_model: ModelMaker,
    tokenizer: PreTrainedTokenizerBase,
    source: str | Path | Mapping[str, Any],
    config: FinetuneConfig,
    out: str | Path,
    *,
    task: GlueTask | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run the grid, or what is left of it.

    Args:
        make_model: from a number of labels (1: regression) to a fresh sequence classifier with the
            pre-trained weights; its new head comes from torch's generator, which is seeded.
        tokenizer: of the model; joins pairs.
        source: of the task's data, see `memlm.data.glue.read_glue`.
        config: the grid.
        out: folder of the runs; created.
        task: one of your own, by the name in ``config``; None: GLUE's of that name.
        quiet: no progress bar.

    Returns:
        The table: settings, all runs, medians per rate, the best rate, its medians and its best
        seed, whose test predictions lie in ``out`` if they were asked for.

    Raises:
        InputError: if the task is unknown, or data are missing or do not fit it.
        FingerprintError: if ``out`` holds runs of another model, data or settings.
    """
    if task is None:
        task = glue_task(config.task)
    else:
        check(
            task.name == config.task,
            f"the task must have the configured name, {config.task!r}, got {task.name!r}",
        )
    check(tokenizer.pad_token_id is not None, "the tokenizer must have a padding token")
    out = Path(out)
    splits = {split: read_glue(task, source, split) for split in ("train", *task.held_out)}
    classes = list(task.classes)
    if task.classes and config.legacy_classes:
        ranks = by_frequency(splits["train"].labels)
        classes = [classes[number] for number in np.argsort(ranks)]
        splits = {
            name: one._replace(labels=ranks[one.labels.astype(np.int64)])
            for name, one in splits.items()
        }
    for split in task.test if config.predict else ():
        texts = read_test(task, source, split)
        splits[split] = Samples(texts, np.zeros(len(texts), splits["train"].labels.dtype))
    data = {name: _tokenize(one, tokenizer, config.max_length) for name, one in splits.items()}
    grid = _Grid(make_model, tokenizer, data, classes, task, config)
    first = grid.run(config.learning_rates[0], config.seeds[0])
    processes = PartialState(cpu=on_cpu(first))
    if processes.is_main_process:
        open_run(out, grid.identity(), resume=True)
    processes.wait_for_everyone()
    runs = []
    for rate in config.learning_rates:
        for seed in config.seeds:
            folder = out / _folder(rate, seed)
            if not (folder / _RESULT).exists():
                metrics = _run(grid, rate, seed, folder, quiet=quiet)
                write_json(folder / _RESULT, {"rate": rate, "seed": seed, "metrics": metrics})
                if not config.keep_models:
                    (folder / "model.safetensors").unlink(missing_ok=True)
            runs.append(read_json(folder / _RESULT))
    table = _table(task, config, runs)
    write_json(out / _TABLE, table)
    for split in task.test if config.predict else ():
        name = predictions_name(task, split)
        link_or_copy(out / _folder(table["best_rate"], table["best_seed"]) / name, out / name)
    return table


def describe_table(table: Mapping[str, Any]) -> str:
    """The table as lines to print, with its protocol."""
    names = list(next(iter(table["medians"].values())))
    width = max(len(name) for name in names)
    heading = "  ".join(f"{name:>{width}}" for name in names)
    lines = [f"{table['task']}: {table['protocol']}", f"{'rate':>8}  {heading}"]
    for rate, medians in table["medians"].items():
        mark = " *" if float(rate) == table["best_rate"] else ""
        values = "  ".join(f"{100 * medians[name]:>{width}.2f}" for name in names)
        lines.append(f"{rate:>8}  {values}{mark}")
    return "\n".join(lines)


class _Shuffled(Dataset):
    """Samples in an order of each epoch; example i belongs to epoch i // samples."""

    def __init__(self, data: LabelledSamples, seed: int):
        self.data, self.seed = data, seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __getitem__(self, item: int) -> tuple[list[int], Any]:
        epoch, place = divmod(item, len(self.data.tokens))
        if self._order is None or self._order[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            self._order = epoch, draw.permutation(len(self.data.tokens))
        number = int(self._order[1][place])
        return self.data.tokens[number], self.data.labels[number]


class _Grid(NamedTuple):
    """What all runs of a grid have in common."""

    make_model: ModelMaker
    tokenizer: PreTrainedTokenizerBase
    data: dict[str, LabelledSamples]
    classes: list[str]
    task: GlueTask
    config: FinetuneConfig

    def model(self, seed: int) -> PreTrainedModel:
        with random_state_kept():
            torch.manual_seed(seed)
            return self.make_model(self.task.num_labels)

    def run(self, rate: float, seed: int) -> RunConfig:
        return self.config.run(self.task, len(self.data["train"].tokens), rate, seed)

    def identity(self) -> dict[str, Any]:
        hashes = {f"{name} data": _hash(one) for name, one in self.data.items()}
        return {"config": self.config.shared(), "model": model_hash(self.model(0)), **hashes}


def _folder(rate: float, seed: int) -> str:
    return f"rate-{rate:g}-seed-{seed}"


def _run(
    grid: _Grid, rate: float, seed: int, folder: Path, *, quiet: bool
) -> dict[str, dict[str, float]]:
    data, task, config = grid.data, grid.task, grid.config
    model = grid.model(seed)
    pad = int(grid.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def collate(rows: list[tuple[list[int], Any]]) -> dict[str, Tensor]:
        return _batch([row for row, _ in rows], np.array([label for _, label in rows]), pad)

    trained = train(
        ModelLoss(model),
        _Shuffled(data["train"], seed),
        InTurn(config.batch_size),
        grid.run(rate, seed),
        folder,
        collate=collate,
        identity={"model": model_hash(model), "data": _hash(data["train"]), "task": task.name},
        resume=folder.exists(),
        quiet=quiet,
    )
    legacy = config.batch_size if config.legacy_batch_mean else None
    found = {}
    for split in (*task.held_out, *(task.test if config.predict else ())):
        predicted = predict(trained, data[split], batch_size=config.batch_size, pad=pad)
        if split in task.held_out:
            labels = data[split].labels
            found[split] = score(task.metrics, predicted, labels, legacy_batches=legacy)
        else:
            write_predictions(folder / predictions_name(task, split), predicted, grid.classes)
    return found


@torch.no_grad()
def predict(
    model: PreTrainedModel, data: LabelledSamples, *, batch_size: int, pad: int
) -> NDArray[np.number]:
    """Classes, or numbers of a regression, for every sample in order."""
    found = []
    model.eval()
    for begin in range(0, len(data.tokens), batch_size):
        part = slice(begin, begin + batch_size)
        batch = _batch(data.tokens[part], data.labels[part], pad)
        batch.pop("labels")
        logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
        found.append((logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1)).float().cpu())
    predicted = torch.cat(found).numpy()
    return predicted if np.issubdtype(data.labels.dtype, np.floating) else predicted.astype(int)


def _tokenize(
    samples: Samples, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> LabelledSamples:
    texts = list(zip(*samples.texts, strict=True))
    first, *second = map(list, texts)
    encoded = tokenizer(first, *second, truncation=True, max_length=max_length)  # type: ignore
    return LabelledSamples(encoded["input_ids"], samples.labels)  # type: ignore[arg-type]


def _batch(rows: list[list[int]], labels: NDArray[np.number], pad: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    truth = torch.from_numpy(labels)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": truth.float() if truth.is_floating_point() else truth,
    }


def _hash(data: LabelledSamples) -> str:
    digest = xxhash.xxh3_128()
    for row in data.tokens:
        digest.update(np.array(row, np.int64).tobytes())
    digest.update(data.labels.tobytes())
    return digest.hexdigest()


def _seeds(config: FinetuneConfig) -> str:
    count = len(config.seeds)
    return f"{count} seeds" if count > 1 else "1 seed"


def _table(task: GlueTask, config: FinetuneConfig, runs: list[dict[str, Any]]) -> dict[str, Any]:
    medians: dict[str, dict[str, float]] = {}
    for rate in config.learning_rates:
        mine = [run["metrics"] for run in runs if run["rate"] == rate]
        medians[f"{rate:g}"] = {
            f"{split} {name}": statistics.median(metrics[split][name] for metrics in mine)
            for split in task.held_out
            for name in task.metrics
        }
    split, metric = task.held_out[0], task.metrics[0]
    headline = f"{split} {metric}"
    best = max(medians, key=lambda rate: medians[rate][headline])
    ours = [run for run in runs if f"{run['rate']:g}" == best]
    means = "mean over batches" if config.legacy_batch_mean else "over all samples"
    return {
        "task": task.name,
        "protocol": f"median of {_seeds(config)} in %, {means}; * best by {headline}",
        "config": config.to_dict(),
        "runs": runs,
        "medians": medians,
        "best_rate": float(best),
        "best_seed": max(ours, key=lambda run: run["metrics"][split][metric])["seed"],
        "best": medians[best],
    }
