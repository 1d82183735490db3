"""Lambda attention on NVIDIA GPUs in half precision: FlashAttention over the window, and the sinks.

torch's `varlen_attn` (FlashAttention 2, Dao 2023) attends over packed rows of any length with a
sliding window, and returns log-sum-exps. Padding is left out when rows are packed. The queries of a
row are the last of its keys, which is how the kernel aligns them. Sinks are a partial softmax of
their own, a product of n x sinks, and join by a `union` (see `memlm.ops.merge`). Nothing is
compiled.

Rotations are computed in float32, relative to the windows of at most 16,384 queries, before
rounding to half precision. Log-sum-exps carry no gradient there, so training takes another
implementation.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memlm.ops.lambda_rule import Keys, Scores, before_window, reach, sink_part
from memlm.ops.parts import Part, union_of_parts

_QUERIES = 16_384  # of one call
_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST = 256  # head dimension of the kernel


@functools.cache
def kernel() -> Callable[..., Any] | None:
    """`torch.nn.attention.varlen.varlen_attn`, if this torch has it with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    needed = {"window_size", "return_aux", "enable_gqa", "scale"}
    return varlen_attn if needed <= set(inspect.signature(varlen_attn).parameters) else None


def can_varlen(query: Tensor, positions: Tensor, keys: Keys, scores: Scores) -> bool:
    """Whether ``varlen`` computes this call; arguments as in ``window_attention``."""
    if (
        not query.is_cuda
        or query.shape[2] == 0
        or torch.version.hip is not None
        or kernel() is None
        or torch.cuda.get_device_capability(query.device) < (8, 0)
        or query.dtype not in _DTYPES
        or not query.dtype == keys.key.dtype == keys.value.dtype
        or query.shape[-1] != keys.value.shape[-1]
        or query.shape[-1] > _WIDEST
        or query.shape[-1] % 8
        or scores.slopes is not None
        or scores.softcap is not None
        or (torch.is_grad_enabled() and (query.requires_grad or keys.key.requires_grad))
    ):
        return False
    return is_packable(positions, keys.positions)


def is_packable(positions: Tensor, places: Tensor) -> bool:
    """Whether the real queries of every row are the last of its real keys, without a gap.

    Args:
        positions: ``(batch, queries)`` of queries.
        places: ``(batch, keys)`` of keys.
    """
    good = places[:, :0].all(-1)
    for part in (positions, places):
        real = part >= 0
        rising = torch.where(real, part, 0)
        # the n-th real one is the first one plus n, and the last one is the same in both
        first = torch.where(real, part, torch.iinfo(part.dtype).max).amin(-1, keepdim=True)
        good = good & ((rising - first - real.cumsum(-1) + 1 == 0) | ~real).all(-1)
    asked = (positions >= 0).any(-1)
    good &= ~asked | (positions.amax(-1) == places.amax(-1))
    good &= (positions >= 0).sum(-1) <= (places >= 0).sum(-1)
    return bool(good.all())


def varlen(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    sinks: Keys,
    scores: Scores,
    other: Part | None = None,
) -> Tensor:
    """As ``window_attention``, for what ``can_varlen`` accepts."""
    outputs, begin = [], 0
    for start in range(0, query.shape[2], _QUERIES):
        part = slice(start, start + _QUERIES)
        asked, places = query[:, :, part], positions[:, part]
        begin, end = reach(places, keys.positions, begin, scores.config.window)
        parts = [_local(asked, places, keys.narrow(begin, end), scores)]
        if sinks.positions.shape[1]:
            parts.append(sink_part(asked, places, sinks, scores))
        if other is not None:
            parts.append(other.narrow(start, start + _QUERIES))
        outputs.append(union_of_parts(*parts).to(keys.value.dtype))
    return torch.cat(outputs, dim=2)


def _local(query: Tensor, positions: Tensor, keys: Keys, scores: Scores) -> Part:
    """The window's part, by the kernel."""
    from torch.nn.attention.varlen import AuxRequest

    window = scores.config.window
    base = before_window(positions, window)
    real = positions >= 0
    held = (keys.positions >= 0) & (keys.positions > base)
    held &= keys.positions <= positions.amax(-1, keepdim=True)
    near = scores.turn(query.float(), (positions - base).clamp(min=0)).to(query.dtype)
    key = scores.turn(keys.key.float(), (keys.positions - base).clamp(min=0)).to(query.dtype)
    asked, given = real.sum(-1), held.sum(-1)
    longest = int(asked.max())
    if longest == 0:
        output = query.new_zeros(*query.shape[:3], keys.value.shape[-1])
        return Part(output, query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32))
    attend: Any = kernel()  # ``can_varlen`` has seen that it is there
    packed, lse = attend(
        near.transpose(1, 2)[real],
        key.transpose(1, 2)[held],
        keys.value.transpose(1, 2)[held],
        functional.pad(asked.cumsum(0), (1, 0)).int(),
        functional.pad(given.cumsum(0), (1, 0)).int(),
        longest,
        int(given.max()),
        return_aux=AuxRequest(lse=True),
        scale=scores.scale,
        window_size=(window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    output = packed.new_zeros(*real.shape, *packed.shape[1:])
    total = lse.new_full((*real.shape, lse.shape[0]), -torch.inf)
    output[real], total[real] = packed, lse.transpose(0, 1)  # (heads, tokens) on NVIDIA GPUs
    return Part(output.transpose(1, 2), total.transpose(1, 2))
