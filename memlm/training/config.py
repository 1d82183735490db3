"""What a training run is: the data of a step, how it learns, what is kept, and of what model.

`RunConfig` is what every method shares. `TrainConfig` adds what training a causal language model
needs: the objective and, for a model from scratch, its shape. Free of torch, so that command-line
help is instant. A preset is a complete configuration under a name; parameter counts are stated for
a vocabulary of 4,096 and computed by ``parameters``.
"""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal, Self

from memlm.core.config import Config, check, check_at_least
from memlm.training.objectives.config import Method, Objective

Preset = Literal["tiny", "small", "base", "demo"]


@dataclass(frozen=True)
class RunConfig(Config):
    """One training run, whatever is trained.

    Exactly one of ``max_steps`` and ``max_seconds`` says when to stop. With ``max_steps`` a run is
    repeatable. With ``max_seconds`` the first steps are timed, then the number of steps is fixed
    so that the learning rate reaches its end when the time does.

    Attributes:
        block_length: input tokens of one training example.
        batch_tokens: input tokens of one micro-batch on one device: as many whole examples as fit.
        accumulate: micro-batches per optimiser step; every target of a step counts alike.
        optimizer: ``"adamw"``; ``"muon"`` for the matrices inside the layers, AdamW for the rest;
            ``"nag"``, Nesterov's momentum; or ``"fairseq_adam"``, which decays every weight.
        learning_rate: its peak, reached after ``warmup_steps``.
        muon_learning_rate: the peak for matrices under ``"muon"``; the rest has ``learning_rate``.
        momentum: Nesterov's.
        schedule: how the rate decays: ``"linear"`` or ``"cosine"`` to zero at the last step,
            ``"constant"``, ``"restarts"`` (cosine in periods), ``"inverse_sqrt"`` or
            ``"polynomial"`` (BERT's: the first step has rate 0, the fall begins at the peak).
        warmup_steps: optimiser steps of linear rise.
        start_learning_rate: where the rise begins; restarts and inverse_sqrt only.
        min_learning_rate: lowest rate of a period of restarts.
        period: steps of the first period of restarts; None: all that follow the warm-up.
        period_growth: how much longer each period is than the one before.
        period_shrink: how much lower its rates are.
        weight_decay: apart from the gradient, on matrices only.
        beta1: AdamW's decay of the mean gradient.
        beta2: AdamW's decay of the mean squared gradient.
        clip_norm: largest norm of the gradient; 0: never clipped.
        max_steps: optimiser steps, or None.
        max_seconds: wall-clock seconds of training, evaluations and checkpoints in it included, the
            last evaluation not; or None.
        log_every: optimiser steps between points of the loss curve.
        evaluate_every: optimiser steps between evaluations; None: only at the end.
        save_every: optimiser steps between checkpoints; None: none.
        keep_last: checkpoints that are kept.
        keep_steps: steps after which the model is kept for good, as ``step-N``.
        keep_best: keep the model with the lowest held-out loss so far, as ``best``.
        precision: arithmetic of the matrix products (weights stay float32); ``"auto"``: bfloat16
            where the processor multiplies it in hardware. float16 needs a CUDA device.
        checkpoint_layers: keep only the inputs of layers and compute the rest again (gradient
            checkpointing): less memory, a third more time.
        sharded: share weights, gradients and optimiser between processes (FSDP).
        report_to: trackers of the Trainer, e.g. ``("tensorboard",)``.
        device: ``"auto"``: an accelerator if there is one.
        threads: CPU threads; None: as they are.
        seed: of the weights and of the order of the examples.

    Raises:
        InputError: if a number is out of range or not exactly one limit is given.
    """

    block_length: int = 256
    batch_tokens: int = 2048
    accumulate: int = 1
    optimizer: Literal["adamw", "muon", "nag", "fairseq_adam"] = "adamw"
    learning_rate: float = 3e-3
    muon_learning_rate: float = 6e-3
    momentum: float = 0.99
    schedule: Literal["linear", "cosine", "constant", "restarts", "inverse_sqrt", "polynomial"] = (
        "linear"
    )
    warmup_steps: int = 50
    start_learning_rate: float = 0.0
    min_learning_rate: float = 0.0
    period: int | None = None
    period_growth: float = 1.0
    period_shrink: float = 1.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    max_steps: int | None = None
    max_seconds: float | None = None
    log_every: int = 10
    evaluate_every: int | None = None
    save_every: int | None = None
    keep_last: int = 2
    keep_steps: tuple[int, ...] = ()
    keep_best: bool = False
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    checkpoint_layers: bool = False
    sharded: bool = False
    report_to: tuple[str, ...] = ()
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        check_at_least(self, 1, *_AT_LEAST_ONE)
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            check(value >= 0, f"{name} must not be negative, got {value}")
        check(self.block_length >= 2, f"block_length must be at least 2, got {self.block_length}")
        check(
            self.batch_tokens >= self.block_length,
            "batch_tokens must hold at least one example of block_length tokens, got "
            f"{self.batch_tokens} for {self.block_length}",
        )
        for name in ("learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            check(value > 0, f"{name} must be above zero, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{name} must be from 0 up to below 1, got {value}")
        check(0 < self.momentum < 1, f"momentum must lie between 0 and 1, got {self.momentum}")
        check(
            (self.max_steps is None) != (self.max_seconds is None),
            "exactly one of max_steps and max_seconds must be given, "
            f"got max_steps={self.max_steps} and max_seconds={self.max_seconds}",
        )
        check(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds must be above zero, got {self.max_seconds}",
        )
        check(
            self.max_seconds is None or self.schedule not in PLANNED,
            f"the schedule {self.schedule} is planned in steps: give max_steps, not max_seconds",
        )
        check(
            not self.keep_best or self.evaluate_every is not None,
            "keep_best compares evaluations on the way: give evaluate_every",
        )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name, allowed[0])
            check(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def rows(self) -> int:
        """Examples of a micro-batch on one device."""
        return self.batch_tokens // self.block_length

    @property
    def step_tokens(self) -> int:
        """Tokens read per optimiser step and device."""
        return self.block_length * self.rows * self.accumulate

    def identity(self) -> dict[str, Any]:
        """The settings that a resumed run must share with the one it continues."""
        values = self.to_dict()
        for name in _WATCHING:
            values.pop(name)
        return values

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The settings that have one."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}

    def with_limit(self, *, max_steps: int) -> Self:
        """The repeatable run of ``max_steps`` steps that is otherwise the same."""
        return replace(self, max_steps=max_steps, max_seconds=None)


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One training of a causal language model.

    A model from scratch is a Llama (Touvron et al. 2023; embeddings tied to the head) of the
    stated shape; a model that is continued keeps its own, and the shape here does not count.

    Attributes:
        method: ``"ce"`` (plain cross-entropy) or how the model is trained with memory:
            ``"trime"``, ``"trime_long"`` or ``"trime_ext"`` (Zhong et al. 2022, section 3).
        memory_after: first optimiser steps with plain cross-entropy. The paper: 5 % of all.
        temperature: of the training memory.
        drop_own: for trime_ext, the probability that a step hides a row's own past.
        group_by: for trime_ext, what stands together in a batch: ``"text"`` (blocks that follow
            each other) or ``"bm25"`` (similar ones, see `memlm.data.lexical`).
        ranks_per_stream: for trime_long, processes that read one stream together.
        detach_remote: keys of other processes get no gradient.
        tap: which hidden states are keys.
        hidden_size: width of the residual stream.
        layers: decoder blocks.
        heads: attention heads; divide ``hidden_size``.
        intermediate_size: width of the gated feed-forward.

    Raises:
        InputError: if a number is out of range.
    """

    method: Method = "ce"
    memory_after: int = 0
    temperature: float = 1.0
    drop_own: float = 0.9
    group_by: Literal["text", "bm25"] = "text"
    ranks_per_stream: int = 1
    detach_remote: bool = False
    tap: str = "auto"
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    intermediate_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # checks its own part
        check_at_least(self, 1, *SHAPE)
        check(
            self.hidden_size % self.heads == 0 and self.hidden_size // self.heads % 2 == 0,
            "hidden_size must be an even multiple of heads (rotary positions turn pairs), "
            f"got {self.hidden_size} for {self.heads} heads",
        )

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> Self:
        """A complete configuration by name, with some settings changed.

        Args:
            name: ``"tiny"``, ``"small"``, ``"base"`` or ``"demo"``.
            **changes: fields to set; ``max_steps`` or ``max_seconds`` replaces the preset's limit.

        Raises:
            InputError: for an unknown name or setting.
        """
        check(name in PRESETS, f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
        values = PRESETS[name]
        if {"max_steps", "max_seconds"} & set(changes):
            values = {**values, "max_steps": None, "max_seconds": None}
        return cls.from_dict({**values, **changes})

    def objective(self) -> Objective:
        """What is lowered."""
        return Objective(
            method=self.method,
            tap=self.tap,
            temperature=self.temperature,
            warmup_steps=self.memory_after,
            drop_own=self.drop_own,
            ranks_per_stream=self.ranks_per_stream,
            detach_remote=self.detach_remote,
            seed=self.seed,
        )

    def parameters(self, vocab_size: int) -> int:
        """How many weights a model from scratch has; embedding and head are one matrix."""
        width = self.hidden_size
        layer = 4 * width * width + 3 * width * self.intermediate_size + 2 * width
        return vocab_size * width + self.layers * layer + width


SHAPE = ("hidden_size", "layers", "heads", "intermediate_size")
_WATCHING = (
    "log_every",
    "evaluate_every",
    "save_every",
    "keep_last",
    "keep_steps",
    "keep_best",
    "report_to",
    "threads",
)
_AT_LEAST_ONE = (
    "accumulate",
    "period",
    "max_steps",
    "log_every",
    "evaluate_every",
    "save_every",
    "keep_last",
    "threads",
)
PLANNED = ("restarts", "inverse_sqrt", "polynomial")  # schedules that must know all steps
_NOT_NEGATIVE = ("weight_decay", "clip_norm", "warmup_steps", "seed")
_CHOICES = {
    "optimizer": ("adamw", "muon", "nag", "fairseq_adam"),
    "schedule": ("linear", "cosine", "constant", *PLANNED),
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu"),
    "group_by": ("text", "bm25"),
}

# Complete settings by name. Weights for a vocabulary of 4,096: tiny 1.18 M, small 5.07 M, base
# 40.6 M.
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
    # For a GPU: 1.6 G tokens.
    "base": {
        "hidden_size": 512,
        "layers": 12,
        "heads": 8,
        "intermediate_size": 1408,
        "block_length": 512,
        "batch_tokens": 32_768,
        "max_steps": 50_000,
        "learning_rate": 1e-3,
        "warmup_steps": 1000,
        "schedule": "cosine",
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
