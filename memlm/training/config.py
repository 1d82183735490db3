"""What a training run is: the shape of the model, the data it sees, and how it learns.

Free of torch, so that command-line help is instant. A preset is a complete configuration under a
name; parameter counts are stated for a vocabulary of 4,096 and computed by ``parameters``.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from memlm.core.config import Config, check

Preset = Literal["tiny", "small", "demo"]


@dataclass(frozen=True)
class TrainConfig(Config):
    """One training of a small Llama (Touvron et al. 2023; embeddings tied to the head).

    Exactly one of ``max_steps`` and ``max_seconds`` says when to stop. With ``max_steps`` a run is
    repeatable. With ``max_seconds`` the first steps are timed, then the number of steps is fixed
    so that the learning rate reaches its end when the time does.

    Attributes:
        hidden_size: width of the residual stream.
        layers: decoder blocks.
        heads: attention heads; divide ``hidden_size``.
        intermediate_size: width of the gated feed-forward.
        block_length: input tokens of one training example; also the model's context length.
        batch_blocks: examples per device and micro-batch.
        accumulate: micro-batches per optimiser step.
        optimizer: ``"adamw"`` for all weights, or ``"muon"`` for the matrices inside the layers.
        learning_rate: its peak, reached after ``warmup_steps``.
        muon_learning_rate: the peak for matrices under ``"muon"``; the rest has ``learning_rate``.
        schedule: how it decays afterwards, to zero at the last step.
        warmup_steps: optimiser steps of linear rise.
        weight_decay: AdamW's, on matrices only.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        clip_norm: largest norm of the gradient; 0: never clipped.
        max_steps: optimiser steps, or None.
        max_seconds: wall-clock seconds of training, evaluations and checkpoints in it included, the
            last evaluation not; or None.
        log_every: optimiser steps between points of the loss curve.
        evaluate_every: optimiser steps between evaluations; None: only at the end.
        save_every: optimiser steps between checkpoints; None: none.
        precision: arithmetic of the matrix products (weights stay float32); ``"auto"``: bfloat16
            where the processor multiplies it in hardware.
        device: ``"auto"``: an accelerator if there is one.
        threads: CPU threads; None: as they are.
        seed: of the weights and of the order of the examples.

    Raises:
        InputError: if a number is out of range or not exactly one limit is given.
    """

    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 256
    block_length: int = 256
    batch_blocks: int = 8
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 6e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 50
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    max_steps: int | None = None
    max_seconds: float | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in ("weight_decay", "clip_norm", "warmup_steps", "seed"):
            value = getattr(self, name)
            check(value >= 0, f"{name} must not be negative, got {value}")
        check(self.block_length >= 2, f"block_length must be at least 2, got {self.block_length}")
        check(
            self.hidden_size % self.heads == 0 and self.hidden_size // self.heads % 2 == 0,
            "hidden_size must be an even multiple of heads (rotary positions turn pairs), "
            f"got {self.hidden_size} for {self.heads} heads",
        )
        for name in ("learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            check(value > 0, f"{name} must be above zero, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name} must be from 0 up to below 1, got {value}")
        check(
            (self.max_steps is None) != (self.max_seconds is None),
            "exactly one of max_steps and max_seconds must be given, "
            f"got max_steps={self.max_steps} and max_seconds={self.max_seconds}",
        )
        check(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds must be above zero, got {self.max_seconds}",
        )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            check(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> Self:
        """A complete configuration by name, with some settings changed.

        Args:
            name: ``"tiny"``, ``"small"`` or ``"demo"``.
            **changes: fields to set; ``max_steps`` or ``max_seconds`` replaces the preset's limit.

        Raises:
            InputError: for an unknown name or setting.
        """
        check(name in PRESETS, f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(changes) - known)
        check(not unknown, f"TrainConfig has no setting named {', '.join(unknown)}")
        values = PRESETS[name]
        if {"max_steps", "max_seconds"} & set(changes):
            values = {**values, "max_steps": None, "max_seconds": None}
        return cls(**{**values, **changes})

    def parameters(self, vocab_size: int) -> int:
        """How many weights the model has; embedding and head are one matrix."""
        width = self.hidden_size
        layer = 4 * width * width + 3 * width * self.intermediate_size + 2 * width
        return vocab_size * width + self.layers * layer + width

    @property
    def step_tokens(self) -> int:
        """Tokens read per optimiser step and device."""
        return self.block_length * self.batch_blocks * self.accumulate

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it continues."""
        values = self.to_dict()
        for name in ("log_every", "evaluate_every", "save_every", "threads"):
            values.pop(name)
        return values

    def with_limit(self, *, max_steps: int) -> Self:
        """The repeatable run of ``max_steps`` steps that is otherwise the same."""
        return replace(self, max_steps=max_steps, max_seconds=None)


_AT_LEAST_ONE = (
    "hidden_size",
    "layers",
    "heads",
    "intermediate_size",
    "batch_blocks",
    "accumulate",
    "max_steps",
    "log_every",
    "evaluate_every",
    "save_every",
    "threads",
)
_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "schedule": ("linear", "cosine", "constant"),
    "precision": ("auto", "float32", "bfloat16"),
    "device": ("auto", "cpu"),
}

# Complete settings by name. Weights for a vocabulary of 4,096: tiny 1.18 M, small 5.07 M.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "layers": 4,
        "heads": 4,
        "intermediate_size": 256,
        "max_steps": 2000,
    },
    "small": {
        "hidden_size": 256,
        "layers": 5,
        "heads": 4,
        "intermediate_size": 704,
        "max_steps": 5000,
        "learning_rate": 2e-3,
    },
    # Chosen for 110 s on two CPU threads and 1.5 MB of text.
    "demo": {
        "hidden_size": 128,
        "layers": 4,
        "heads": 4,
        "intermediate_size": 256,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "muon_learning_rate": 6e-3,
        "max_seconds": 110.0,
    },
}
