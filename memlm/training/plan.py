"""What a run will be, before it starts: parameters, tokens, memory, time.

Memory is an estimate for one device: weights, gradients and the optimiser's averages (16 bytes per
parameter; 12 under nag) and the activations of a micro-batch. Time is the arithmetic of the run, 6
operations per weight and token and the attention's, at the speed of a matrix product measured here
and now, times what a step reaches of it in practice.
"""

from typing import Any, NamedTuple

import torch

from memlm.core.threads import multiply_adds_per_second
from memlm.data.tokens import TokenCorpus
from memlm.training.config import TrainConfig
from memlm.training.learning import resolve_precision

_REACHED = 0.4  # of the speed of one large product, by a whole step of a small model


class Shape(NamedTuple):
    """What an estimate needs to know of a model.

    Attributes:
        parameters: weights.
        layers: blocks.
        width: of the residual stream.
        intermediate: of the feed-forward.
    """

    parameters: int
    layers: int
    width: int
    intermediate: int


def shape_of(model: Any) -> Shape:
    """The shape of a model that is to be continued, as far as its settings say."""
    config = model.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return Shape(model.num_parameters(), config.num_hidden_layers, width, inner)


def describe_training(
    config: TrainConfig,
    vocab_size: int,
    corpus: TokenCorpus | None = None,
    *,
    shape: Shape | None = None,
    processes: int = 1,
) -> dict[str, Any]:
    """What a run will be.

    Args:
        config: the run.
        vocab_size: of a model from scratch.
        corpus: its text, if it is there already.
        shape: of the model to continue; None: a new one.
        processes: how many will run.

    Returns:
        ``parameters``, ``step_tokens`` and ``tokens`` (of all processes; None under a time budget),
        ``precision``, ``memory_bytes`` (of one device), ``hours``, ``epochs`` (None without a
        corpus) and ``text``, a line to print.
    """
    if shape is None:
        shape = Shape(
            config.parameters(vocab_size),
            config.layers,
            config.hidden_size,
            config.intermediate_size,
        )
    precision = resolve_precision(config)
    step_tokens = config.step_tokens * processes
    memory = _memory(config, shape, precision, processes)
    tokens = hours = epochs = None
    if config.max_steps is not None:
        tokens = config.max_steps * step_tokens
        attention = 12 * shape.layers * shape.width * config.block_length / 2
        work = (6 * shape.parameters + attention) * tokens
        if config.checkpoint_layers:
            work *= 4 / 3
        hours = work / (_REACHED * _measured_speed(config, precision) * processes) / 3600
        epochs = None if corpus is None else tokens / len(corpus)
    limit = f"{config.max_steps:,} steps" if config.max_steps else f"{config.max_seconds:g} s"
    parts = [
        config.method,
        f"{shape.parameters:,} parameters",
        f"{step_tokens:,} tokens per step",
        limit,
        *([] if tokens is None else [f"{tokens:,} tokens"]),
        *([] if epochs is None else [f"{epochs:.1f} epochs"]),
        precision,
        f"about {memory / 1e6:,.0f} MB",
        *([] if hours is None else [f"about {hours:.2g} hours on this machine"]),
    ]
    return {
        "parameters": shape.parameters,
        "step_tokens": step_tokens,
        "tokens": tokens,
        "precision": precision,
        "memory_bytes": memory,
        "hours": hours,
        "epochs": epochs,
        "text": ", ".join(parts),
    }


def _memory(config: TrainConfig, shape: Shape, precision: str, processes: int) -> int:
    # Kept for the backward pass, per token and layer: about 16 rows of the width and 5 of the
    # feed-forward, in 4 bytes each (half of them in 2 under bfloat16); or one row.
    row = 16 * shape.width + 5 * shape.intermediate
    if config.checkpoint_layers:
        row = shape.width
    activations = config.rows * config.block_length * shape.layers * row
    weights = (12 if config.optimizer == "nag" else 16) * shape.parameters
    if config.sharded:
        weights //= processes
    return weights + activations * (4 if precision == "float32" else 3)


def _measured_speed(config: TrainConfig, precision: str) -> float:
    """Operations per second of a matrix product on the device of the run."""
    accelerated = config.device == "auto" and torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if accelerated else None
    dtype = getattr(torch, precision)
    return 2 * multiply_adds_per_second(config.threads, device or "cpu", dtype)
