"""Loss by position: how well token p of a text is predicted, averaged over texts the right way.

Texts have different lengths, so fewer and fewer reach a position; each position is averaged over
the texts that do:

    mean[p] = sum over documents with a p-th scored token of nll[p] / their number

``p = 0`` is the first token that is scored, the second of a text. Over all of it two averages are
in use, and they differ: every token alike (``by_token``, the usual perplexity), or the mean over
documents of their means (``by_document``, which LM-Infinite's scripts print).

Source: LM-Infinite (Han et al. 2024), its perplexity script. Differs from it: sums are gathered
once, where the script rewrites all of its statistics after every batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.data.slices import Side, truncate
from memlm.evaluation.reader import read_whole

Losses = Sequence[NDArray[np.float64]]


class Averages(NamedTuple):
    """Averages of losses in nats.

    Attributes:
        mean: where anything was scored.
        variance: of the population.
        counts: how many losses each is over.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    counts: NDArray[np.int64]


def document_losses(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    length: int | None = None,
    side: Side = "right",
    chunk: int = 4096,
) -> list[NDArray[np.float64]]:
    """The loss of every token but the first of each document, one forward pass per document.

    Args:
        model: extended or not.
        documents: token ids; the first one of each is context only.
        length: tokens that are kept of each; None: all.
        side: see `memlm.data.slices.truncate`.
        chunk: tokens that an extended model reads at once.

    Returns:
        One array of ``len - 1`` losses per document of at least two tokens, in order.
    """
    losses = []
    for document in documents:
        tokens = truncate(document, length, side)
        if len(tokens) > 1:
            row = read_whole(model, torch.tensor([tokens]), chunk=chunk)
            losses.append(row[0].cpu().numpy())
    return losses


def by_position(losses: Losses) -> Averages:
    """Averages at every position, over the documents that reach it.

    Raises:
        InputError: if there are no losses.
    """
    check(len(losses) > 0, "an average needs at least one scored document, got none")
    longest = max(map(len, losses))
    count, total, squares = np.zeros(longest, np.int64), np.zeros(longest), np.zeros(longest)
    for row in losses:
        count[: len(row)] += 1
        total[: len(row)] += row
    mean = total / count
    for row in losses:
        squares[: len(row)] += (row - mean[: len(row)]) ** 2
    return Averages(mean, squares / count, count)


def by_length(losses: Losses) -> dict[int, tuple[float, float]]:
    """Mean and population variance of document means, by how many tokens were scored."""
    groups: dict[int, list[float]] = {}
    for row in losses:
        groups.setdefault(len(row), []).append(float(np.mean(row)))
    return {n: (float(np.mean(x)), float(np.var(x))) for n, x in sorted(groups.items())}


def by_token(losses: Losses) -> float:
    """Mean over all scored tokens."""
    return float(np.concatenate(losses).mean())


def by_document(losses: Losses) -> float:
    """Mean over documents of their means: what LM-Infinite's scripts print."""
    return float(np.mean([row.mean() for row in losses]))


def near(losses: Losses, position: int, width: int) -> float:
    """Mean over the ``width`` scored tokens of each document that end at ``position``.

    Args:
        losses: of documents.
        position: number of the last of them, counted in tokens of the text.
        width: how many.

    Raises:
        InputError: if no document is long enough.
    """
    rows = [row[max(position - width - 1, 0) : position - 1] for row in losses]
    rows = [row for row, whole in zip(rows, losses, strict=True) if len(whole) >= position - 1]
    check(bool(rows), f"a document must have {position} tokens to be scored there, got none")
    return by_token(rows)
