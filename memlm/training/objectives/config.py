"""Which objective a model is trained with, and its settings; free of torch.

`memlm.training.objectives` says what each does and what it needs of a batch.
"""

from dataclasses import dataclass
from typing import Literal

from memlm.core.config import Config, check

Method = Literal["ce", "trime", "trime_long", "trime_ext"]
METHODS: tuple[Method, ...] = ("ce", "trime", "trime_long", "trime_ext")


@dataclass(frozen=True)
class Objective(Config):
    """What is lowered; the defaults are those of TRIME (Zhong et al. 2022, section 3).

    Attributes:
        method: "ce", "trime", "trime_long" or "trime_ext".
        tap: which hidden states are queries and keys (see `memlm.models.taps`).
        temperature: divides the memory's scores beside ``sqrt(dim)``.
        warmup_steps: first optimiser steps with plain cross-entropy. The paper: 5 % of all.
        drop_own: for trime_ext, the probability that a step hides the row's own past, so that the
            model learns to use the rest (section 4.2; 0.9 there).
        ranks_per_stream: for trime_long, how many consecutive processes read one stream.
        detach_remote: keys of other processes get no gradient, as in the paper's code.
        seed: of the draws for ``drop_own``.

    Raises:
        InputError: if a setting is out of range.
    """

    method: Method = "ce"
    tap: str = "auto"
    temperature: float = 1.0
    warmup_steps: int = 0
    drop_own: float = 0.9
    ranks_per_stream: int = 1
    detach_remote: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        check(
            self.method in METHODS, f"method must be one of {', '.join(METHODS)}, got {self.method}"
        )
        check(
            0 < self.temperature < float("inf"),
            f"temperature must be a finite number above 0, got {self.temperature}",
        )
        check(self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}")
        check(
            0 <= self.drop_own <= 1,
            f"drop_own is a probability and must lie between 0 and 1, got {self.drop_own}",
        )
        check(
            self.ranks_per_stream >= 1,
            f"ranks_per_stream must be at least 1, got {self.ranks_per_stream}",
        )
        check(self.seed >= 0, f"seed must not be negative, got {self.seed}")
