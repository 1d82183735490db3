"""What a pre-training on masked tokens is: a run, a model's size and position scheme, the masks.

Defaults are a small run. ``published()`` is the recipe of Ke et al. (2021), section 4.1: a million
steps of 256 blocks of 512 tokens, Adam as fairseq computes it with decay 0.01 on every weight, rate
1e-4 after 10,000 steps, falling to 0. Free of torch.
"""

from dataclasses import dataclass
from typing import Any, Self

from memlm.core.config import check, check_at_least
from memlm.data.masking import Masking
from memlm.positions.scheme import PositionScheme
from memlm.training.config import SHAPE, RunConfig
from memlm.training.polynomial import warmup_steps_of


@dataclass(frozen=True)
class MaskedLMConfig(RunConfig):
    """A pre-training on masked tokens.

    Attributes:
        scheme: of positions, by name.
        hidden_size: width of the model.
        layers: of it.
        heads: of its attention.
        intermediate_size: width of the feed-forward.
        dropout: of hidden states and of attention.
        mask_prob: share of tokens that are predicted.
        whole_words: mask words instead of tokens.
        legacy_seeds: draw the masks as the TUPE authors' code does, see `Masking`.
        warmup_ratio: of all optimiser steps, instead of ``warmup_steps``, which is set to it.

    Raises:
        InputError: if a number is out of range.
    """

    block_length: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    beta2: float = 0.999
    scheme: str = "tupe-r"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 512
    dropout: float = 0.1
    mask_prob: float = 0.15
    whole_words: bool = False
    legacy_seeds: bool = False
    warmup_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None:
            check(
                self.max_steps is not None,
                "warmup_ratio is a share of max_steps: give max_steps, not max_seconds",
            )
            steps = warmup_steps_of(self.warmup_ratio, self.max_steps or 0)
            object.__setattr__(self, "warmup_steps", steps)
        super().__post_init__()
        PositionScheme.named(self.scheme)
        self.masking()  # checks its own part
        check(0 <= self.dropout < 1, f"dropout must lie in [0, 1), got {self.dropout}")
        check_at_least(self, 1, *SHAPE)

    def masking(self) -> Masking:
        """How samples are masked."""
        return Masking(
            mask_prob=self.mask_prob,
            whole_words=self.whole_words,
            legacy_seeds=self.legacy_seeds,
        )

    @classmethod
    def published(cls, **changes: Any) -> Self:
        """The recipe of the paper, for one device of a group of 16."""
        recipe: dict[str, Any] = {
            "block_length": 512,
            "batch_tokens": 16 * 512,
            "optimizer": "fairseq_adam",
            "learning_rate": 1e-4,
            "schedule": "polynomial",
            "warmup_steps": 10_000,
            "max_steps": 1_000_000,
            "log_every": 100,
            "save_every": 25_000,
            "keep_last": 3,
            "keep_steps": (100_000, 300_000, 600_000, 1_000_000),
            "hidden_size": 768,
            "layers": 12,
            "heads": 12,
            "intermediate_size": 3072,
        }
        return cls(**{**recipe, **changes})
