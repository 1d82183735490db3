"""Curves as LM-Infinite draws them: smoothed losses, and how large scores get with distance.

Smoothing is exponential, s_t = (1 - gamma) x_t + gamma s_(t-1) from s_0 = 0, divided by the weight
1 - gamma^t that the values have by then; the original leaves that out, so its first points are too
low. Scores q k / sqrt(dim) of a query at distance d are followed by their largest so far,

    bound(d) = max over distances up to d of the score        mean and deviation over queries

which stays flat within the trained length and rises beyond it (Han et al. 2024, section 3).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memlm.core.config import check


class ScoreBound(NamedTuple):
    """Largest scores up to every distance.

    Attributes:
        rows: ``(queries, distances)``, the first column at distance 0.
        mean: ``(distances,)`` over queries.
        deviation: ``(distances,)`` of the sample of queries.
    """

    rows: NDArray[np.float64]
    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


def smooth(
    values: ArrayLike, gamma: float, *, rule: Literal["correct", "original"] = "correct"
) -> NDArray[np.float64]:
    """Exponentially smoothed values.

    Args:
        values: ``(points,)``.
        gamma: weight of what came before, at least 0 and below 1.
        rule: ``"original"``: as the paper's script, too low at first.

    Raises:
        InputError: if gamma is out of range or the rule unknown.
    """
    check(0 <= gamma < 1, f"gamma must be at least 0 and below 1, got {gamma}")
    check(rule in ("correct", "original"), f"rule must be correct or original, got {rule!r}")
    given = np.asarray(values, dtype=np.float64)
    smoothed = np.empty_like(given)
    last = 0.0
    for at, value in enumerate(given):
        smoothed[at] = last = (1 - gamma) * value + gamma * last
    if rule == "original":
        return smoothed
    return smoothed / (1 - gamma ** np.arange(1, len(given) + 1))


def score_bound(scores: Sequence[ArrayLike], *, longest: int = 8192) -> ScoreBound:
    """Running maximum over distance of the scores of some last queries.

    Args:
        scores: one row per query: its score with every key, in the order of the text, the last key
            being the query's own token. All of one length.
        longest: distances to keep.

    Raises:
        InputError: for fewer than two queries, or queries of different texts' lengths.
    """
    lengths = {len(np.asarray(row)) for row in scores}
    check(
        len(scores) >= 2 and len(lengths) == 1,
        "a deviation needs at least two queries that see equally many keys, got "
        f"{len(scores)} with {sorted(lengths)} keys",
    )
    rows = np.asarray(scores, dtype=np.float64)[:, ::-1][:, :longest]
    bound = np.maximum.accumulate(rows, axis=1)
    return ScoreBound(bound, bound.mean(0), bound.std(0, ddof=1))
