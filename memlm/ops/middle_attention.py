"""Attention of each query to the middle tokens it selects; the rule is in `memlm.ops.middle_rule`.

The result is a `Part`, to be joined with window and sinks under one softmax (the argument ``other``
of `memlm.ops.window_attention.window_attention`). Middle tokens come in `Blocks`. Where a block is
in its row is known from its number, so that blocks may lie in any order, on another device than the
query, and rows of a batch have blocks of their own:

    tokens of block b    positions sinks + b * size  to  sinks + (b + 1) * size - 1

A block can be selected as soon as its first token has left the window; of its tokens, those that
are still inside the window are left to it. A block is not larger than the window, so by then it is
complete, and so are its bounds.

Selected blocks are copied together for every query and head, `k` keys each: linear in the length,
and `queries_at_once` says how many queries to ask at a time. Selecting compares every query with
the bounds of every block before it. Blocks with equal bounds are taken in any order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.ops.lambda_rule import LambdaConfig, Rotate
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.middle_rule import MiddleConfig
from memlm.ops.parts import Part

_NUMBERS = 2**22  # held by one step, about


class Blocks(NamedTuple):
    """Middle tokens of every row.

    Attributes:
        key: ``(batch, key heads, slots, size, dim)``, not rotated, contiguous.
        value: ``(batch, key heads, slots, size, value dim)``, contiguous.
        bounds: ``(batch, key heads, slots, 2 * dim)``: the largest and the smallest entries of a
            block's keys.
        numbers: ``(batch, slots)`` int64: which block a slot holds; -1: none. Here and in
            ``bounds`` there may be fewer slots: the others are not asked.
    """

    key: Tensor
    value: Tensor
    bounds: Tensor
    numbers: Tensor

    def first(self, slots: int) -> "Blocks":
        """Only the first slots are asked."""
        return self._replace(bounds=self.bounds[:, :, :slots], numbers=self.numbers[:, :slots])


def bounds_of(key: Tensor) -> Tensor:
    """``(..., 2 * dim)`` bounds of the blocks ``(..., size, dim)``."""
    key = key.detach()
    return torch.cat([key.amax(-2), key.amin(-2)], dim=-1)


def queries_at_once(query: Tensor, blocks: Blocks, config: MiddleConfig) -> int:
    """How many queries ``(batch, heads, queries, dim)`` to ask in one step, from 1 to 64."""
    each = query.shape[0] * query.shape[1] * (config.k * query.shape[3] + blocks.numbers.shape[1])
    return min(64, max(1, _NUMBERS // max(1, each)))


def middle_part(
    query: Tensor,
    positions: Tensor,
    blocks: Blocks,
    config: MiddleConfig,
    seen: LambdaConfig,
    *,
    rotate: Rotate | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Part:
    """What middle tokens give these queries.

    Args:
        query: ``(batch, heads, queries, dim)``, not rotated.
        positions: ``(batch, queries)`` int64, -1 for padding.
        blocks: at least every block with a token before the last query; on any device.
        config: of the middle.
        seen: window and sinks.
        rotate: as in `memlm.ops.window_attention.window_attention`.
        slopes: alike.
        scale: alike.
        softcap: alike.

    Returns:
        In float32 at least, on the device of ``query``; zeros and -inf where nothing is seen.
    """
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    distance = seen.window // 2 if config.distance is None else config.distance
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    if rotate is not None:
        query = rotate(query, torch.full_like(positions, distance))
        # keys stand at 0, where the rotation may still scale (YaRN): the same on either side
        query = rotate(query, torch.zeros_like(positions))
    home = blocks.key.device
    slots, found = _selected(query.detach().to(home), positions.to(home), blocks, config, seen)
    key, value, places = _gathered(slots, blocks, seen.sinks)
    key, value = (part.to(query.device, query.dtype) for part in (key, value))
    far = places.to(query.device) <= (positions - seen.window)[:, None, :, None, None]
    far = (far & found.to(query.device)[..., None]).flatten(3)

    scores = (query[..., None, :] @ key.transpose(-1, -2)).squeeze(-2) * scale
    if slopes is not None:
        scores = scores - slopes.to(scores)[:, None, None] * distance
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~far, -torch.inf)
    lse = safe_logsumexp(scores)
    empty = ~far.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    return Part((weights[..., None, :] @ value).squeeze(-2), lse)


def _selected(
    query: Tensor, positions: Tensor, blocks: Blocks, config: MiddleConfig, seen: LambdaConfig
) -> tuple[Tensor, Tensor]:
    """The slots ``(batch, heads, queries, blocks)`` with the best bounds, and which are there."""
    first = seen.sinks + blocks.numbers * config.block
    distance = positions[:, :, None] - first[:, None]
    may = (distance >= seen.window) & (blocks.numbers >= 0)[:, None]
    if config.capacity is not None:
        may &= distance < seen.window + config.capacity
    if config.rule == "last":
        may &= (positions - seen.window + 1 - seen.sinks >= config.k)[..., None]
    grouped = query.unflatten(1, (blocks.key.shape[1], -1)).flatten(2, 3)
    if config.block == 1:
        asked = blocks.key[:, :, : blocks.numbers.shape[1], 0]
        bounds = grouped @ asked.to(query.dtype).transpose(-1, -2)
    else:
        parts = torch.cat([grouped.clamp(min=0), grouped.clamp(max=0)], dim=-1)
        bounds = parts @ blocks.bounds.to(query.dtype).transpose(-1, -2)
    bounds = bounds.unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    bounds = bounds.masked_fill(~may[:, None], -torch.inf)
    count = min(config.k // config.block, bounds.shape[-1])
    best, slots = torch.topk(bounds, count, dim=-1, sorted=False)
    return slots, ~torch.isneginf(best)


def _gathered(slots: Tensor, blocks: Blocks, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``(batch, heads, queries, tokens, dim)`` of slots, and their positions.

    Positions are ``(batch, heads, queries, blocks, size)``.
    """
    batch, key_heads, held, size = blocks.key.shape[:4]
    rows = torch.arange(batch * key_heads, device=slots.device) * held
    index = slots.unflatten(1, (key_heads, -1)) + rows.view(batch, key_heads, 1, 1, 1)
    key, value = (
        part.flatten(0, 2)
        .index_select(0, index.flatten())
        .view(*slots.shape, size, -1)
        .flatten(3, 4)
        for part in (blocks.key, blocks.value)
    )
    wide = blocks.numbers[:, None, None].expand(*slots.shape[:3], -1)
    places = sinks + wide.gather(-1, slots)[..., None] * size
    return key, value, places + torch.arange(size, device=slots.device)
