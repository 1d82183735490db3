"""Lambda attention of one new token per row, on keys that stay where they were written.

A ring of S slots holds the latest keys: the key at position p lies in slot p mod S, *rotated by its
slot*. A query at position p = lap * S + s meets keys of two laps,

    slot c <= s    this lap        distance s - c        rotate the query by s
    slot c >  s    the last one    distance s + S - c    rotate the query by s + S

so two rotations of the query give all true distances. No stored key is rotated again or moved, no
rotation ever exceeds 2 S, and a step costs the same after two hundred million tokens as after ten
thousand, to the bit. Sinks lie before the ring, unrotated.

Differs from the paper's code, which keeps every key and rotates all of them at every step.
"""

import torch
from torch import Tensor

from memlm.ops.lambda_rule import Keys, LambdaConfig, Rotate, Scores, grouped_dots, sink_scores
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.parts import Part, union_of_parts


def step_attention(
    query: Tensor,
    positions: Tensor,
    held: Keys,
    slots: int,
    config: LambdaConfig,
    *,
    rotate: Rotate | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    other: Part | None = None,
) -> Tensor:
    """Attention of one query per row over sinks and ring.

    Args:
        query: ``(batch, heads, 1, dim)``, not rotated.
        positions: ``(batch, 1)`` int64, -1 for padding.
        held: ``config.kept`` unrotated columns, then the ring or its first columns, which are
            rotated by their slots and hold the query's own key already.
        slots: S, at least ``config.window``.
        config: window, sinks and limit.
        rotate: as in `memlm.ops.window_attention.window_attention`.
        slopes: alike.
        scale: alike.
        softcap: alike.
        other: alike.

    Returns:
        ``(batch, heads, 1, value dim)``; zeros where nothing is seen.
    """
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    limit = config.distance_limit
    if limit is not None and config.clamp == "original":
        limit = min(limit, int(positions.max()))
    scores = Scores(config, limit, rotate, slopes, scale, softcap)
    sinks = held.narrow(0, config.kept)
    ring = held.narrow(config.kept, held.positions.shape[1])
    rows = [_ring_scores(query, positions, ring, slots, scores)]
    if config.kept:
        rows.insert(0, sink_scores(query, positions, sinks, scores))
    joined = torch.cat(rows, dim=-1).to(torch.promote_types(query.dtype, torch.float32))
    empty = torch.isneginf(joined).all(-1, keepdim=True)
    weights = torch.softmax(joined.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    output = weights.flatten(2, 3).to(held.value.dtype) @ held.value
    output = output.unflatten(2, weights.shape[2:4]).flatten(1, 2)
    if other is None:
        return output
    part = Part(output, safe_logsumexp(joined).flatten(1, 2))
    return union_of_parts(part, other).to(output.dtype)


def _ring_scores(
    query: Tensor, positions: Tensor, ring: Keys, slots: int, scores: Scores
) -> Tensor:
    distance = positions[:, :, None] - ring.positions[:, None, :]
    seen = (distance >= 0) & (distance < scores.config.window)
    seen &= (positions >= 0)[:, :, None] & (ring.positions >= 0)[:, None, :]
    if scores.rotate is None:
        return scores.finish(grouped_dots(query, ring.key), distance, seen)
    slot = positions.clamp(min=0) % slots
    laps = torch.cat([slot, slot + slots], dim=1)
    # keys are read once for both rotations
    both = grouped_dots(scores.turn(query.expand(-1, -1, 2, -1), laps), ring.key)
    this, last = both.split(1, dim=3)
    columns = torch.arange(ring.positions.shape[1], device=slot.device)
    dots = torch.where((columns <= slot)[:, None, None, None], this, last)
    return scores.finish(dots, distance, seen)
