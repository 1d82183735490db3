"""Lambda attention: a window of the latest keys and a few first ones, under one softmax.

LM-Infinite (Han et al. 2024): query i sees key j at distance d = i - j if

    local    0 <= d < window                       scored at its true distance d
    sink     d >= window and j < sinks or pinned    scored at min(d, distance_limit)

    score(i, j) = <R(d') q_i, k_j> * scale - slope * d'     d' the distance above, R(p) rotary

The two sets are disjoint, so attention over them is a union (see `memlm.ops.merge`): one softmax.
For sequences of at most `window` tokens it is ordinary causal attention.

Keys come as they are, *not* rotated, with the position of each in its row; padding has position
-1 and is never seen, and a padding query gets zeros. Since only distances matter, the blocked
implementation rotates by positions relative to the window: exact at any length, where absolute
positions in float32 are not. Sinks are given apart from the other keys, because a cache keeps them
after the window has left them; a key may be in both, and each query sees it through one.

Differs from the paper's code: a sink keeps its true distance while that is below the limit, where
the code puts all sinks at ``min(distance_limit, length - 1)``, so that later tokens change earlier
rows if the limit exceeds the window (``clamp="original"`` does so too). The softmax is in float32
at least, no n x n or n x window tensor is held, padding is masked.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from memlm.core.errors import InputError
from memlm.ops.lambda_rule import (
    Keys,
    LambdaConfig,
    Rotate,
    Scores,
    before_window,
    first_keys,
    grouped_dots,
    reach,
    sink_keys,
    sink_scores,
)
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.parts import Part, union_of_parts
from memlm.ops.window_flex import can_flex, flex
from memlm.ops.window_tiles import can_tile, tiled
from memlm.ops.window_varlen import can_varlen, varlen

Impl = Literal["auto", "reference", "blocked", "tiled", "flex", "varlen"]
_BLOCK = 512
_LONG = 2048  # queries, from which on compiling is worth its while
_NEEDS = {
    "tiled": (
        "tiles need float32, float64 or bfloat16 on a CPU without gradients, rows without "
        "padding, neither slopes nor soft-cap, and a torch with the fused kernel"
    ),
    "varlen": (
        "varlen needs float16 or bfloat16 on an NVIDIA GPU (Ampere or newer) without gradients, "
        "neither slopes nor soft-cap, and a torch with its kernel"
    ),
    "flex": (
        "flex needs float32, bfloat16 or float16 where torch can compile; on a CPU also no "
        "gradients and all sinks at one distance, so no limit beyond the window"
    ),
}

__all__ = ["Keys", "LambdaConfig", "Rotate", "first_keys", "sink_keys", "window_attention"]


def window_attention(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    sinks: Keys,
    config: LambdaConfig,
    *,
    rotate: Rotate | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    other: Part | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention over a window and over sinks, normalised together.

    Args:
        query: ``(batch, heads, queries, dim)``, not rotated; heads a multiple of the key heads.
        positions: ``(batch, queries)`` int64, -1 for padding.
        keys: every key that a window can reach, in order.
        sinks: from ``sink_keys``.
        config: window, sinks and limit.
        rotate: rotary embedding; None for models without.
        slopes: ``(heads,)`` of ALiBi (Press et al. 2022).
        scale: of the scores; default ``dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        other: what these queries see besides, under the same softmax.
        impl: ``"reference"`` holds all scores; ``"blocked"`` those of 512 queries at a time;
            ``"tiled"`` (CPU, `memlm.ops.window_tiles`), ``"varlen"`` (CUDA in half precision,
            `memlm.ops.window_varlen`) and ``"flex"`` (where torch compiles,
            `memlm.ops.window_flex`) hold none; ``"auto"``: the fastest that can compute the call;
            flex only on CUDA, and for 2048 queries or more.

    Returns:
        ``(batch, heads, queries, value dim)`` in the dtype of ``value``; zeros where nothing is
        seen.

    Raises:
        InputError: if the shapes do not fit, ``impl`` is unknown or cannot compute this call.
    """
    if impl not in get_args(Impl):
        raise InputError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    _check_shapes(query, positions, keys, sinks)
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    limit = config.distance_limit
    if limit is not None and config.clamp == "original" and keys.positions.numel():
        limit = min(limit, int(torch.maximum(keys.positions.max(), positions.max())))
    scores = Scores(config, limit, rotate, slopes, scale, softcap)
    if impl == "reference":
        return _reference(query, positions, keys, sinks, scores, other)
    given = (query, positions, keys, sinks, scores, other)
    if impl in ("auto", "tiled") and can_tile(query, positions, keys, scores):
        return tiled(*given)
    if impl in ("auto", "varlen") and can_varlen(query, positions, keys, scores):
        return varlen(*given)
    worth = impl == "flex" or (impl == "auto" and query.is_cuda and query.shape[2] >= _LONG)
    if worth and can_flex(query, keys, scores, other):
        output = flex(*given)
        if output is not None:
            return output
    if impl in _NEEDS:
        raise InputError(f"{_NEEDS[impl]}, got something else; use impl='auto'")
    return _blocked(*given)


def _reference(
    query: Tensor, positions: Tensor, keys: Keys, sinks: Keys, scores: Scores, other: Part | None
) -> Tensor:
    """Every pair of query and key, one distance after the other."""
    window, limit = scores.config.window, scores.limit
    work = torch.promote_types(query.dtype, torch.float32)
    key = torch.cat([keys.key, sinks.key], dim=2).to(work)
    value = torch.cat([keys.value, sinks.value], dim=2).to(work)
    places = torch.cat([keys.positions, sinks.positions], dim=1)
    is_sink = torch.arange(places.shape[1], device=places.device) >= keys.positions.shape[1]

    distance = positions[:, :, None] - places[:, None, :]
    seen = torch.where(is_sink, distance >= window, (distance >= 0) & (distance < window))
    seen &= (positions >= 0)[:, :, None] & (places >= 0)[:, None, :]
    if scores.config.clamp == "streaming":
        kept = positions.clamp(max=window + scores.config.sinks - 1)
        distance = torch.where(is_sink, kept[:, :, None] - places[:, None, :], distance)
    elif limit is not None:
        fixed = scores.config.clamp == "original"
        far = torch.full_like(distance, limit) if fixed else distance.clamp(max=limit)
        distance = torch.where(is_sink, far, distance)

    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    key = scores.turn(key, torch.zeros_like(places))
    query = query.to(work)
    dots = query.new_full((*query.shape[:3], key.shape[2]), -torch.inf)
    for step in distance[seen].unique().tolist():
        turned = scores.turn(query, torch.full_like(positions, step))
        at = (seen & (distance == step))[:, None]
        dots = torch.where(at, turned @ key.transpose(-1, -2) * scores.scale, dots)
    if scores.slopes is not None:
        dots = dots - scores.slopes.to(work).view(1, -1, 1, 1) * distance[:, None]
    if scores.softcap is not None:
        dots = torch.where(
            seen[:, None], scores.softcap * torch.tanh(dots / scores.softcap), -torch.inf
        )
    weights = torch.softmax(dots, dim=-1).masked_fill(~seen.any(-1)[:, None, :, None], 0.0)
    output = weights @ value
    if other is not None:
        output = union_of_parts(Part(output, safe_logsumexp(dots)), other)
    return output.to(keys.value.dtype)


def _blocked(
    query: Tensor, positions: Tensor, keys: Keys, sinks: Keys, scores: Scores, other: Part | None
) -> Tensor:
    """512 queries at a time, against the columns that their windows can reach and the sinks."""
    outputs = []
    begin = 0
    for start in range(0, query.shape[2], _BLOCK):
        part = slice(start, start + _BLOCK)
        begin, end = reach(positions[:, part], keys.positions, begin, scores.config.window)
        block = keys.narrow(begin, end)
        beside = None if other is None else other.narrow(start, start + _BLOCK)
        outputs.append(_block(query[:, :, part], positions[:, part], block, sinks, scores, beside))
    if not outputs:
        return query.new_zeros(*query.shape[:3], keys.value.shape[-1], dtype=keys.value.dtype)
    return torch.cat(outputs, dim=2)


def _block(
    query: Tensor, positions: Tensor, keys: Keys, sinks: Keys, scores: Scores, other: Part | None
) -> Tensor:
    window = scores.config.window
    work = torch.promote_types(query.dtype, torch.float32)
    query = query.to(work)
    real = positions >= 0
    base = before_window(positions, window)
    distance = positions[:, :, None] - keys.positions[:, None, :]
    seen = (distance >= 0) & (distance < window)
    seen &= real[:, :, None] & (keys.positions >= 0)[:, None, :]
    near = grouped_dots(
        scores.turn(query, (positions - base).clamp(min=0)),
        scores.turn(keys.key.to(work), (keys.positions - base).clamp(min=0)),
    )
    rows = [scores.finish(near, distance, seen)]
    values = [keys.value.to(work)]
    if sinks.positions.shape[1]:
        rows.append(sink_scores(query, positions, sinks, scores))
        values.append(sinks.value.to(work))
    joined = torch.cat(rows, dim=-1)
    empty = torch.isneginf(joined).all(-1, keepdim=True)
    weights = torch.softmax(joined.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    output = weights.flatten(2, 3) @ torch.cat(values, dim=2)
    output = output.unflatten(2, weights.shape[2:4]).flatten(1, 2)
    if other is not None:
        output = union_of_parts(Part(output, safe_logsumexp(joined).flatten(1, 2)), other)
    return output.to(keys.value.dtype)


def _check_shapes(query: Tensor, positions: Tensor, keys: Keys, sinks: Keys) -> None:
    if positions.shape != (query.shape[0], query.shape[2]):
        raise InputError(
            f"every query must have one position, got {tuple(positions.shape)} for queries "
            f"{tuple(query.shape)}; give (batch, queries)"
        )
    for part in (keys, sinks):
        if part.positions.shape != (part.key.shape[0], part.key.shape[2]):
            raise InputError(
                f"every key must have one position, got {tuple(part.positions.shape)} for keys "
                f"{tuple(part.key.shape)}; give (batch, keys)"
            )
    if query.shape[1] % keys.key.shape[1]:
        raise InputError(
            f"query heads must be a multiple of key heads, got {query.shape[1]} and "
            f"{keys.key.shape[1]}; check the layout (batch, heads, time, dim)"
        )
