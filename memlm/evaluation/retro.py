"""RETRO with retrieval on, off and with the wrong neighbours: is it the neighbours that help?

    on          every chunk with its own neighbours
    off         no neighbours: the model as an ordinary language model
    shuffled    every chunk with those of another chunk, so that the model has as much to read and
                as many weights at work, but nothing that belongs to the text

    bits per byte = -sum log2 p(token) / bytes of the text            (Borgeaud et al. 2022, 3.2)
    perplexity    = exp(-mean ln p(token))                            per token of the model

Every token of a document but its first is scored once, with what stands before it in its piece of
the document; sequences do not overlap, so the first tokens of a piece have less context than in the
paper's sliding windows, in all three alike.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.progress import bar
from memlm.data.batches import IGNORED
from memlm.models.running import frozen
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.neighbours import NeighbourTable

Mode = Literal["on", "off", "shuffled"]
MODES: tuple[Mode, ...] = ("on", "off", "shuffled")


@dataclass(frozen=True, eq=False)
class RetroEvaluation:
    """One model on one text in one mode.

    Attributes:
        mode: "on", "off" or "shuffled".
        chunk_nats: ``(chunks,)`` float64 sum of -ln p of each chunk's scored tokens.
        chunk_tokens: ``(chunks,)`` int64 how many were scored.
        chunk_bytes: ``(chunks,)`` float64 its part of the document's bytes, by scored tokens; NaN
            where the size of the text is unknown.
    """

    mode: Mode
    chunk_nats: NDArray[np.float64]
    chunk_tokens: NDArray[np.int64]
    chunk_bytes: NDArray[np.float64]

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return int(self.chunk_tokens.sum())

    @property
    def perplexity(self) -> float:
        """Per token of the model."""
        return math.exp(float(self.chunk_nats.sum()) / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the text in UTF-8; NaN where its size is unknown."""
        return float(self.chunk_nats.sum() / math.log(2) / self.chunk_bytes.sum())

    def summary(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return {
            "retrieval": self.mode,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens": self.tokens,
            "bytes": float(self.chunk_bytes.sum()),
        }


def evaluate_retro(
    model: PreTrainedModel,
    data: RetroDataset,
    *,
    mode: Mode = "on",
    batch_size: int = 8,
    seed: int = 1,
    quiet: bool = False,
) -> RetroEvaluation:
    """Score a text with a RETRO model.

    Args:
        model: takes what `RetroDataset` gives, and without ``neighbours`` reads text alone.
        data: the text, with its table of neighbours unless ``mode`` is "off".
        mode: see above.
        batch_size: sequences at once.
        seed: of the permutation that shuffles.
        quiet: show no progress bar.

    Raises:
        InputError: if the mode is unknown, or neighbours are missing.
    """
    check(mode in MODES, f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    check(
        mode == "off" or data.neighbours is not None,
        f"retrieval '{mode}' needs a table of neighbours, but the data have none; give one, or "
        "evaluate with mode='off'",
    )
    check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    text = data.text
    nats, tokens = np.zeros(len(text)), np.zeros(len(text), np.int64)
    donors = _donors(data, seed) if mode == "shuffled" else None
    loader = cast(Iterable[dict[str, Tensor]], DataLoader(data, batch_size=batch_size))
    done = 0
    with frozen(model), bar(len(data), label=f"retrieval {mode}", unit="seq", quiet=quiet) as shown:
        for batch in loader:
            labels = batch.pop("labels")
            numbers = range(done, done + len(labels))
            if mode == "off":
                batch = {name: value for name, value in batch.items() if "neighbour" not in name}
            if donors is not None and data.neighbours is not None:
                batch.update(_of_others(data, data.neighbours, numbers, donors))
            batch = {name: value.to(model.device) for name, value in batch.items()}
            logits = model(**batch, use_cache=False).logits
            losses = _losses(logits, labels.to(model.device)).double().cpu().numpy()
            chunks = np.stack([data.chunk_of_tokens(number) for number in numbers])
            scored = labels.numpy() != IGNORED
            np.add.at(nats, chunks[scored], losses[scored])
            np.add.at(tokens, chunks[scored], 1)
            done += len(labels)
            shown.update(len(labels))
    return RetroEvaluation(mode, nats, tokens, _bytes(data, tokens))


def compare_retrieval(
    model: PreTrainedModel,
    data: RetroDataset,
    *,
    modes: Iterable[Mode] = MODES,
    batch_size: int = 8,
    seed: int = 1,
    quiet: bool = False,
) -> dict[str, RetroEvaluation]:
    """`evaluate_retro` in several modes, by mode."""
    return {
        mode: evaluate_retro(model, data, mode=mode, batch_size=batch_size, seed=seed, quiet=quiet)
        for mode in modes
    }


def table(evaluations: dict[str, RetroEvaluation]) -> str:
    """The figures of several evaluations as lines of text, with their protocol."""
    lines = [f"{'retrieval':<12}{'bits per byte':>14}{'perplexity':>12}{'tokens':>12}"]
    lines += [
        f"{name:<12}{one.bits_per_byte:>14.4f}{one.perplexity:>12.3f}{one.tokens:>12,}"
        for name, one in evaluations.items()
    ]
    lines.append(
        "every token but a document's first scored once, sequences without overlap; perplexity per "
        "token, natural log"
    )
    return "\n".join(lines)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of every token at its own place, ``(batch, time)``; 0 where it is not scored."""
    losses = torch.zeros(labels.shape, device=logits.device)
    for row in range(len(labels)):
        losses[row, 1:] = torch.nn.functional.cross_entropy(
            logits[row, :-1].float(), labels[row, 1:], ignore_index=IGNORED, reduction="none"
        )
    return losses


def _donors(data: RetroDataset, seed: int) -> NDArray[np.int64]:
    """For every chunk the one whose neighbours it gets: one random cycle through all chunks."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~data.text.dead_chunks()))
    donors = np.full(len(data.text), -1, np.int64)
    donors[order] = np.roll(order, 1)
    return donors


def _of_others(
    data: RetroDataset,
    neighbours: NeighbourTable,
    numbers: Iterable[int],
    donors: NDArray[np.int64],
) -> dict[str, Tensor]:
    chunks = np.stack([data.whole_chunks(number) for number in numbers])
    others = np.where(chunks < 0, -1, donors[np.maximum(chunks, 0)])
    ids = neighbours.lookup(others, data.k)
    if data.text.fingerprint == data.database.fingerprint:
        first, end = (bound[..., None] for bound in data.text.own_range(np.maximum(chunks, 0)))
        ids[(ids >= first) & (ids < end)] = -1  # another's neighbour may be of the own document
    found = data.database.gather(ids)
    return {
        "neighbours": torch.from_numpy(np.where(found.valid, found.tokens, data.pad_id)),
        "neighbour_mask": torch.from_numpy(found.valid),
    }


def _bytes(data: RetroDataset, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The bytes of every document, shared among its chunks by scored tokens."""
    text = data.text
    documents = text.document_of(np.arange(len(text)))
    whole = np.bincount(documents, weights=tokens, minlength=text.documents)
    sizes = np.where(text.text_bytes < 0, np.nan, text.text_bytes.astype(np.float64))
    return np.where(tokens > 0, tokens * sizes[documents] / np.maximum(whole[documents], 1), 0.0)
