"""What a training of a RETRO model is: a run, what it reads of its text, the shape of a new model.

Defaults are a small run. ``published()`` is the recipe of Borgeaud et al. (2022), appendix C and
table 10: 419 billion tokens in sequences of 2048, AdamW with decay 0.1, the rate from 1e-7 to its
peak in 750 steps, then along a cosine to a tenth of it. Free of torch.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

from memlm.core.config import check
from memlm.training.config import RunConfig

Size = Literal["172m", "425m", "1.5b", "7.5b"]
_TOKENS = 419_430_400_000
_SEQUENCE = 2048


@dataclass(frozen=True)
class RetroTrainConfig(RunConfig):
    """One training of a RETRO model.

    ``block_length`` is the tokens of a sequence, a whole number of chunks. A model that is
    continued, or given as an architecture, keeps its own shape; that here does not count.

    Attributes:
        k: neighbours of each chunk; None: as many as the table has.
        packed: several pieces of documents in a sequence.
        size: one of the paper's models instead of a small one.
        hidden_size: width of a small one: decoder, encoder, and the one table of words.
        layers: of its decoder.
        encoder_layers: of its encoder.
        heads: of its attention; divide ``hidden_size``.
        cross_attention_layers: of its decoder, counted from 1; None: as the paper spaces them.

    Raises:
        InputError: if a number is out of range.
    """

    block_length: int = 512
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    beta2: float = 0.999
    k: int | None = None
    packed: bool = True
    size: Size | None = None
    hidden_size: int = 128
    layers: int = 4
    encoder_layers: int = 1
    heads: int = 4
    cross_attention_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "hidden_size", "layers", "encoder_layers", "heads"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        sizes = (None, "172m", "425m", "1.5b", "7.5b")
        check(self.size in sizes, f"size must be one of 172m, 425m, 1.5b, 7.5b, got {self.size!r}")
        check(
            self.hidden_size % self.heads == 0 and self.hidden_size // self.heads % 2 == 0,
            "hidden_size must be an even multiple of heads (rotary positions turn pairs), "
            f"got {self.hidden_size} for {self.heads} heads",
        )

    @classmethod
    def published(cls, size: Size = "172m", **changes: Any) -> Self:
        """The recipe of the paper for one of its models, on one device of 16 sequences at a time.

        Args:
            size: of the model.
            **changes: fields to set; ``max_steps`` or ``max_seconds`` replaces the limit.
        """
        large = size == "7.5b"
        sequences, peak = (1024, 1e-4) if large else (256, 2e-4)
        recipe: dict[str, Any] = {
            "size": size,
            "k": 2,
            "block_length": _SEQUENCE,
            "batch_tokens": 16 * _SEQUENCE,
            "accumulate": sequences // 16,
            "learning_rate": peak,
            "schedule": "restarts",  # a single period: one cosine that ends above zero
            "start_learning_rate": 1e-7,
            "min_learning_rate": peak / 10,
            "warmup_steps": 750,
            "weight_decay": 0.1,
            "max_steps": _TOKENS // (sequences * _SEQUENCE),
            "log_every": 100,
            "save_every": 5000,
        }
        if "max_seconds" in changes:
            recipe.pop("max_steps")
        return cls(**{**recipe, **changes})
