"""How sure is a perplexity? A percentile bootstrap over documents (Efron 1979; Koehn 2004).

Tokens of one document are far from independent: a document that suits the datastore is easy all
the way through. So whole documents are drawn with replacement, and the perplexity of every draw,

    exp( sum_d nll_d / sum_d tokens_d )        over the drawn documents d,

is computed from per-document sums. The interval runs between percentiles of the draws. The ratio
of two evaluations is paired: both are read on the *same* drawn documents, so the difficulty that
they share cancels.

With one document there is nothing to draw from, and the honest answer is no interval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
_BLOCK = 1 << 22  # drawn documents held at once


class Interval(NamedTuple):
    """A percentile interval.

    Attributes:
        low: lower end.
        high: upper end.
        level: share of the draws inside, e.g. 0.95.
        resamples: how many times documents were drawn.
        documents: how many documents there were to draw from.
        seed: of the draws.
    """

    low: float
    high: float
    level: float
    resamples: int
    documents: int
    seed: int


def perplexity_interval(
    nll: Sequence[float],
    tokens: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interval | None:
    """The bootstrap interval of ``exp(sum nll / sum tokens)``.

    Args:
        nll: ``(documents,)`` summed negative log-likelihood of every document, nats.
        tokens: ``(documents,)`` scored tokens; documents without any are left out. Other units
            (bytes, words) work as well.
        resamples: number of draws.
        level: share of the draws that the interval holds.
        seed: of the draws; equal seeds give equal intervals.

    Returns:
        None if fewer than two documents were scored.

    Raises:
        InputError: for lengths that differ or settings out of range.
    """
    return _interval([np.asarray(nll, np.float64)], tokens, resamples, level, seed)


def ratio_interval(
    nll: Sequence[float],
    other: Sequence[float],
    tokens: Sequence[int],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = SEED,
) -> Interval | None:
    """The paired bootstrap interval of ``perplexity(nll) / perplexity(other)``.

    Args:
        nll: ``(documents,)`` summed negative log-likelihood of one evaluation, nats.
        other: ``(documents,)`` the same documents' sums in the other evaluation.
        tokens: ``(documents,)`` scored tokens, the same in both.
        resamples: number of draws.
        level: share of the draws that the interval holds.
        seed: of the draws.

    Returns:
        None if fewer than two documents were scored. An interval below 1 says that the first
        evaluation is better beyond the luck of the documents.

    Raises:
        InputError: for lengths that differ or settings out of range.
    """
    sums = [np.asarray(nll, np.float64), np.asarray(other, np.float64)]
    return _interval(sums, tokens, resamples, level, seed)


def _interval(
    sums: list[NDArray[np.float64]], tokens: Sequence[int], resamples: int, level: float, seed: int
) -> Interval | None:
    counts = np.asarray(tokens, np.float64)
    for values in sums:
        check(
            values.shape == counts.shape and counts.ndim == 1,
            f"every document needs one loss and one count, got {values.shape} and {counts.shape}",
        )
    check(resamples >= 1, f"resamples must be at least 1, got {resamples}")
    check(0 < level < 1, f"level must lie between 0 and 1, got {level}")
    scored = counts > 0
    documents = int(scored.sum())
    if documents < 2:
        return None
    # A ratio of perplexities is the perplexity of the losses' difference.
    losses = sums[0][scored] - (sums[1][scored] if len(sums) == 2 else 0.0)
    counts = counts[scored]
    generator = np.random.default_rng(seed)
    block = max(1, _BLOCK // documents)
    drawn = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        choice = generator.integers(0, documents, size=(rows, documents))
        drawn.append(losses[choice].sum(1) / counts[choice].sum(1))
    tail = (1 - level) / 2
    low, high = np.exp(np.quantile(np.concatenate(drawn), (tail, 1 - tail)))
    return Interval(float(low), float(high), level, resamples, documents, seed)
