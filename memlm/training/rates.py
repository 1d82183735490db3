"""Learning rates of the papers by update number: warm-up, then cosine with restarts or 1/sqrt.

The rate of the update after n finished ones, with w updates of warm-up from ``start`` to ``peak``:

    n < w                start + n (peak - start) / w
    cosine               s^i [ low + (peak - low) (1 + cos(pi u_i / P_i)) / 2 ]          u = n - w
    inverse square root  peak sqrt(w / n)

The cosine restarts: period i begins at ``P (1 - t^i) / (1 - t)`` (``i P`` for t = 1), is
``P_i = t^i P`` long, u_i counts from its beginning, and every restart is lower by the factor s
(Loshchilov and Hutter 2017, eq. 5, with the shrinking of fairseq). These are the schedules of TRIME
(WikiText-103 and enwik8: cosine, 150 M: inverse square root) and of the transformers that RETRO and
TUPE build on. Free of torch.
"""

import math
from dataclasses import dataclass

from memlm.core.config import Config, check


@dataclass(frozen=True)
class CosineRate(Config):
    """Cosine with warm restarts.

    Attributes:
        peak: highest rate, reached after ``warmup``.
        period: updates of the first period.
        low: lowest rate of the first period.
        warmup: updates of linear rise.
        start: rate of the first update of the rise.
        growth: how much longer each period is than the one before (t).
        shrink: how much lower each period is than the one before (s).

    Raises:
        InputError: if a number is out of range.
    """

    peak: float
    period: int
    low: float = 0.0
    warmup: int = 0
    start: float = 0.0
    growth: float = 1.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        _check_rise(self.peak, self.warmup, self.start)
        check(self.period >= 1, f"period must be at least 1 update, got {self.period}")
        check(
            0 <= self.low <= self.peak,
            f"low must lie between 0 and peak {self.peak}, got {self.low}",
        )
        check(self.growth >= 1, f"growth must be at least 1, got {self.growth}")
        check(0 < self.shrink <= 1, f"shrink must be above 0 and at most 1, got {self.shrink}")

    def __call__(self, step: int) -> float:
        """The rate of the update after ``step`` finished ones."""
        if step < self.warmup:
            return _rise(step, self.peak, self.warmup, self.start)
        passed = step - self.warmup
        if self.growth == 1:
            number, length = passed // self.period, float(self.period)
            within = float(passed - number * self.period)
        else:
            number = math.floor(math.log(1 - passed / self.period * (1 - self.growth), self.growth))
            length = self.growth**number * self.period
            within = passed - (1 - self.growth**number) / (1 - self.growth) * self.period
        wave = (1 + math.cos(math.pi * within / length)) / 2
        return self.shrink**number * (self.low + (self.peak - self.low) * wave)


@dataclass(frozen=True)
class InverseSqrtRate(Config):
    """Inverse square root of the number of updates.

    Attributes:
        peak: highest rate, reached after ``warmup``.
        warmup: updates of linear rise, at least 1: it sets the scale of the decay.
        start: rate of the first update.

    Raises:
        InputError: if a number is out of range.
    """

    peak: float
    warmup: int
    start: float = 0.0

    def __post_init__(self) -> None:
        _check_rise(self.peak, self.warmup, self.start)
        check(self.warmup >= 1, f"warmup must be at least 1 update, got {self.warmup}")

    def __call__(self, step: int) -> float:
        """The rate of the update after ``step`` finished ones."""
        if step < self.warmup:
            return _rise(step, self.peak, self.warmup, self.start)
        return self.peak * math.sqrt(self.warmup / step)


def _check_rise(peak: float, warmup: int, start: float) -> None:
    check(peak > 0, f"peak must be above zero, got {peak}")
    check(warmup >= 0, f"warmup must not be negative, got {warmup}")
    check(0 <= start <= peak, f"start must lie between 0 and peak {peak}, got {start}")


def _rise(step: int, peak: float, warmup: int, start: float) -> float:
    return start + step * (peak - start) / warmup
