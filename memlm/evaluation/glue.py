"""The metrics of GLUE (Wang et al. 2019), over a whole set of predictions.

    accuracy = share of right classes        F1 = 2 tp / (2 tp + fp + fn)
    Matthews = (tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))
    Pearson = correlation of the numbers     Spearman = correlation of their ranks

F1 and Matthews are 0 where they are undefined. F1's positive class is GLUE's: "duplicate",
"equivalent". The TUPE authors' code numbers classes by frequency and takes class 1, the rarer one;
and it averages the metric of every batch, without weights, which for Matthews and correlations is
another number. ``legacy_batches`` does that, to compare with published logs.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check

Numbers = NDArray[np.number]


class Counts(NamedTuple):
    """Decisions of a classifier on two classes."""

    tp: int
    fp: int
    fn: int
    tn: int


def count(predicted: Numbers, labels: Numbers, *, positive: int = 1) -> Counts:
    """Compare ``(samples,)`` predicted classes with the true ones."""
    said, true = predicted == positive, labels == positive
    return Counts(
        int((said & true).sum()),
        int((said & ~true).sum()),
        int((~said & true).sum()),
        int((~said & ~true).sum()),
    )


def accuracy(counts: Counts) -> float:
    """Share of right decisions."""
    total = sum(counts)
    return (counts.tp + counts.tn) / total if total else 0.0


def f1(counts: Counts) -> float:
    """Harmonic mean of precision and recall; 0 if there is no positive at all."""
    below = 2 * counts.tp + counts.fp + counts.fn
    return 2 * counts.tp / below if below else 0.0


def matthews(counts: Counts) -> float:
    """Matthews correlation; 0 if a class is never said or never true."""
    tp, fp, fn, tn = counts
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / below**0.5 if below else 0.0


def pearson(first: Numbers, second: Numbers) -> float:
    """Correlation of two rows of numbers; 0 if one of them is constant."""
    x = np.asarray(first, dtype=np.float64) - np.mean(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64) - np.mean(second, dtype=np.float64)
    below = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / below if below else 0.0


def spearman(first: Numbers, second: Numbers) -> float:
    """Correlation of ranks; equal numbers share their mean rank."""
    return pearson(_ranks(first), _ranks(second))


METRICS: dict[str, Callable[[Numbers, Numbers, int], float]] = {
    "accuracy": lambda p, y, _: float((p == y).mean()),
    "f1": lambda p, y, positive: f1(count(p, y, positive=positive)),
    "matthews": lambda p, y, positive: matthews(count(p, y, positive=positive)),
    "pearson": lambda p, y, _: pearson(p, y),
    "spearman": lambda p, y, _: spearman(p, y),
}


def score(
    names: Sequence[str],
    predicted: Numbers,
    labels: Numbers,
    *,
    positive: int = 1,
    legacy_batches: int | None = None,
) -> dict[str, float]:
    """Several metrics of one set of predictions.

    Args:
        names: of `METRICS`.
        predicted: ``(samples,)`` classes or numbers.
        labels: likewise, the truth.
        positive: class that F1 and Matthews ask for.
        legacy_batches: if given, the unweighted mean over batches of so many samples.

    Raises:
        InputError: if there are no samples or the numbers do not match.
    """
    check(
        len(predicted) == len(labels) and len(labels) > 0,
        f"there must be one prediction per label, got {len(predicted)} and {len(labels)}",
    )
    for name in names:
        check(name in METRICS, f"a metric must be one of {', '.join(METRICS)}, got {name!r}")
    size = legacy_batches or len(labels)
    parts = [slice(begin, begin + size) for begin in range(0, len(labels), size)]
    return {
        name: float(
            np.mean([METRICS[name](predicted[part], labels[part], positive) for part in parts])
        )
        for name in names
    }


def _ranks(values: Numbers) -> Numbers:
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    return (last - (times - 1) / 2)[place]
