"""Several documents in one row, for any causal language model: does it read them apart?

A mask of ``(batch, 1, time, time)`` keeps documents from seeing each other, positions begin anew at
each. Most families take both as they are; some build masks of their own (ALiBi), some attend in
windows that such a mask overrides. So it is proven with the model itself before it is used.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.errors import UnsupportedModelError
from memlm.models.extend_families import own_window
from memlm.models.extend_probe import tolerance
from memlm.models.extension import attention_layers
from memlm.models.retro.grid import ChunkGrid, chunk_grid
from memlm.models.retro.model import sight_mask
from memlm.models.running import frozen
from memlm.models.taps import body


def is_packed(grid: ChunkGrid, real: Tensor | None) -> bool:
    """Whether a row of a grid holds several documents; padding is none."""
    if grid.documents is None:
        return False
    numbers = grid.documents if real is None else grid.documents.masked_fill(~real, 1)
    return int(numbers.max()) > 1


def packed_arguments(model: PreTrainedModel, grid: ChunkGrid, real: Tensor | None) -> dict:
    """What the forward pass of a model gets, so that the documents of a grid are apart.

    Args:
        model: the causal language model.
        grid: with documents, without a past.
        real: ``(batch, time)`` bool, False for padding.
    """
    mask = sight_mask(grid, real, 0, grid.positions.shape[1], model.dtype)
    given: dict[str, Any] = {"attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = grid.positions
    return given


def check_window(model: PreTrainedModel, time: int) -> None:
    """Refuse rows that are longer than a sliding window of the model.

    Raises:
        UnsupportedModelError: naming both.
    """
    windows = [own_window(layer) for layer in attention_layers(body(model))]
    shortest = min((window for window in windows if window is not None), default=time)
    if shortest < time:
        raise UnsupportedModelError(
            f"documents can share a row of at most {shortest} tokens, the sliding window of "
            f"{type(model).__name__}, got {time}; give them one by one (packed=False)"
        )


def prove_packing(model: PreTrainedModel) -> None:
    """Two documents in a row must be read as apart.

    Raises:
        UnsupportedModelError: if they are not.
    """
    device = model.device
    tokens = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    documents = torch.tensor([[0] * 3 + [1] * 5], device=device)
    grid = chunk_grid(1, 8, 8, document_ids=documents, device=device)
    given = {**packed_arguments(model, grid, None), "use_cache": False}
    try:
        with frozen(model):
            together = model(input_ids=tokens, **given).logits
            parts = tokens.split([3, 5], 1)
            apart = torch.cat([model(input_ids=one, use_cache=False).logits for one in parts], 1)
        off = float((together - apart).norm() / apart.norm())
        reason = None if off <= tolerance(model) else f"they are off by {off:.1e}"
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} must read documents of one row apart, but a probe failed "
            f"({reason}); give them one by one (packed=False)"
        )
