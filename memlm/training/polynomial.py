"""Warm-up and polynomial decay, the schedule of BERT, RoBERTa and TUPE.

The rate of the update after n finished ones, with W of warm-up and N in all:

    n < W         peak n / W
    n >= W        end + (peak - end) (1 - (n - W) / (N - W))^power           end from N on

The first update of a warm-up has rate 0. ``warmup_steps_of`` turns a share of the run into steps of
the optimiser. The TUPE authors' fine-tuning differs in the first update: it uses that of the second
(``first_moves``), and it counts steps without regard to accumulated batches. Free of torch.
"""

from dataclasses import dataclass

from memlm.core.config import Config, check


@dataclass(frozen=True)
class PolynomialRate(Config):
    """Linear rise, polynomial fall.

    Attributes:
        peak: highest rate.
        steps: N, updates of the run.
        warmup: W, updates of linear rise.
        power: of the fall; 1 is linear.
        end: rate at the end.
        first_moves: the first update has the rate of the second instead of 0.

    Raises:
        InputError: if a number is out of range.
    """

    peak: float
    steps: int
    warmup: int = 0
    power: float = 1.0
    end: float = 0.0
    first_moves: bool = False

    def __post_init__(self) -> None:
        check(self.peak > 0, f"peak must be above zero, got {self.peak}")
        check(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        check(
            0 <= self.warmup <= self.steps,
            f"warmup must lie between 0 and {self.steps} steps, got {self.warmup}",
        )
        check(self.power > 0, f"power must be above zero, got {self.power}")
        check(0 <= self.end <= self.peak, f"end must lie between 0 and the peak, got {self.end}")

    def __call__(self, step: int) -> float:
        """The rate of the update after ``step`` finished ones."""
        if self.first_moves:
            step = max(step, 1)
        if step <= self.warmup and self.warmup:
            return self.peak * step / self.warmup
        if step >= self.steps:
            return self.end
        left = 1 - (step - self.warmup) / (self.steps - self.warmup)
        return self.end + (self.peak - self.end) * left**self.power


def warmup_steps_of(ratio: float, steps: int) -> int:
    """Updates of warm-up for a share of a run: at least 1 if the share is not zero.

    Raises:
        InputError: if ``ratio`` is not in [0, 1).
    """
    check(0 <= ratio < 1, f"warmup_ratio must lie in [0, 1), got {ratio}")
    return max(1, round(ratio * steps)) if ratio else 0
