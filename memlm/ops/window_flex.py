"""Lambda attention by torch's compiled FlexAttention: padding, ALiBi and soft-caps, no scores held.

FlexAttention (Dong et al. 2024) takes which blocks of 128 columns a block of 128 queries sees, and
a function that decides within a block. Here both come from two numbers per column, so nothing of
size n x n is ever made: a query at position p sees a column if ``after <= p < until``, where

    local key at position j    after = j             until = j + window
    sink at position j         after = j + window    until = never

Sinks are scored with another rotation of the query than local keys. There are two ways:

    on CUDA    two partial softmaxes, joined by their log-sum-exps (`union`)
    on CPUs    one softmax over queries and keys of double width, since the compiled kernel returns
               no log-sum-exps there: query [near | far], local key [key | 0], sink [0 | key]

Positions are relative to the window of at most 4096 queries. The kernel is compiled once for every
shape (symbolic ones fail on CPUs), which takes seconds, so shapes are rounded up to few. Where it
cannot be compiled ``flex`` gives None, and it is not tried again. On CPUs it has no gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from memlm.ops.lambda_rule import Keys, Scores, before_window, reach, sink_part
from memlm.ops.parts import Part, union_of_parts

_QUERIES = 4096  # of one call; bounds what is held besides inputs and outputs
_BLOCK = 128
_NEVER = 2**30
_SHAPES = 64  # compiled at most
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Columns(NamedTuple):
    """What a query sees of every column, ``(batch, keys)`` int32, in relative positions.

    The distance of ALiBi is ``min(query - origin, most)``.
    """

    after: Tensor
    until: Tensor
    origin: Tensor
    most: Tensor

    def joined(self, other: "_Columns") -> "_Columns":
        return _Columns(*(torch.cat(pair, dim=1) for pair in zip(self, other, strict=True)))


def can_flex(query: Tensor, keys: Keys, scores: Scores, other: Part | None) -> bool:
    """Whether ``flex`` computes this call, if it compiles; arguments as in ``window_attention``."""
    if query.shape[2] == 0 or query.dtype not in _DTYPES:
        return False
    if not query.dtype == keys.key.dtype == keys.value.dtype:
        return False
    if query.is_cuda:
        return True
    graded = torch.is_grad_enabled() and (query.requires_grad or keys.key.requires_grad)
    return query.device.type == "cpu" and not graded and other is None and _one_turn(scores)


def _one_turn(scores: Scores) -> bool:
    """Whether every query meets all its sinks in one rotation: double width has no room for two."""
    config, limit = scores.config, scores.limit
    if scores.rotate is None or config.kept == 0 or config.clamp != "causal":
        return True
    return not config.pinned if limit is None else limit <= config.window


def flex(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    sinks: Keys,
    scores: Scores,
    other: Part | None = None,
) -> Tensor | None:
    """As ``window_attention``, for what ``can_flex`` accepts; None if it cannot be compiled."""
    outputs, begin = [], 0
    for start in range(0, query.shape[2], _QUERIES):
        part = slice(start, start + _QUERIES)
        asked = positions[:, part]
        begin, end = reach(asked, keys.positions, begin, scores.config.window)
        beside = None if other is None else other.narrow(start, start + _QUERIES)
        here = keys.narrow(begin, end)
        span = joined_span if query.is_cuda else _wide_span
        output = span(query[:, :, part], asked, here, sinks, scores, beside)
        if output is None:
            return None
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def joined_span(
    query: Tensor, positions: Tensor, keys: Keys, sinks: Keys, scores: Scores, other: Part | None
) -> Tensor | None:
    """Partial softmaxes of window, sinks and others, joined; arguments as in ``flex``."""
    base = before_window(positions, scores.config.window)
    near, own, key, columns = _window(query, positions, keys, base, scores)
    local = _attend(near, key, keys.value, own, columns, scores, with_lse=True)
    if local is None:
        return None
    parts = [local, *([other] if other else [])]
    if sinks.positions.shape[1]:
        parts.append(sink_part(query, positions, sinks, scores))
    return union_of_parts(*parts).to(keys.value.dtype)


def _wide_span(
    query: Tensor, positions: Tensor, keys: Keys, sinks: Keys, scores: Scores, _: Part | None
) -> Tensor | None:
    """One softmax over queries and keys of double width."""
    base = before_window(positions, scores.config.window)
    near, own, key, columns = _window(query, positions, keys, base, scores)
    value = keys.value
    if sinks.positions.shape[1]:
        far, still = _far(query, positions, sinks, scores)
        near = torch.cat([near, far], dim=-1)
        wide = torch.cat([torch.zeros_like(still), still], dim=-1)
        key = torch.cat([wide, torch.cat([key, torch.zeros_like(key)], dim=-1)], dim=2)
        value = torch.cat([sinks.value, value], dim=2)
        columns = _distant(sinks, base, scores).joined(columns)
    found = _attend(near, key, value, own, columns, scores, with_lse=False)
    return None if found is None else found.output


def _window(
    query: Tensor, positions: Tensor, keys: Keys, base: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor, _Columns]:
    """Queries and keys rotated relative to ``base``, where they are, and what is seen of keys."""
    own = torch.where(positions >= 0, positions - base, -1)
    # a column that no window of these queries reaches is none
    held = (keys.positions >= 0) & (keys.positions > base)
    places = torch.where(held, keys.positions - base, -1)
    near = scores.turn(query, own.clamp(min=0))
    key = scores.turn(keys.key, places.clamp(min=0))
    return near, own, key, _local(places, scores.config.window)


def _local(places: Tensor, window: int) -> _Columns:
    real = places >= 0
    after, never = torch.where(real, places, _NEVER), torch.full_like(places, _NEVER)
    return _Columns(after, torch.where(real, places + window, _NEVER), places, never)


def _distant(sinks: Keys, base: Tensor, scores: Scores) -> _Columns:
    """The columns of sinks, and the distances at which ALiBi has them."""
    window, places = scores.config.window, sinks.positions - base
    never = torch.full_like(places, _NEVER)
    after = torch.where(sinks.positions >= 0, (places + window).clamp(min=0), _NEVER)
    origin, most = places.clamp(min=-_NEVER // 2), never
    if scores.limit is not None:
        most = torch.full_like(places, scores.limit)
    if scores.config.clamp == "original":
        origin = -never // 2
    elif scores.config.clamp == "streaming":
        most = window + scores.config.sinks - 1 - sinks.positions
    return _Columns(after, never, origin, most)


def _far(query: Tensor, positions: Tensor, sinks: Keys, scores: Scores) -> tuple[Tensor, Tensor]:
    """Queries and keys of sinks, rotated to where they meet."""
    if scores.config.clamp == "streaming":
        near = positions.clamp(min=0, max=scores.config.window + scores.config.sinks - 1)
        return scores.turn(query, near), scores.turn(sinks.key, sinks.positions.clamp(min=0))
    if scores.limit is None:
        still = scores.turn(sinks.key, sinks.positions.clamp(min=0))
        return scores.turn(query, positions.clamp(min=0)), still
    still = scores.turn(sinks.key, torch.zeros_like(sinks.positions))
    return scores.turn(query, torch.full_like(positions, scores.limit)), still


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own: Tensor,
    columns: _Columns,
    scores: Scores,
    with_lse: bool,
) -> Part | None:
    """One call of the kernel; rows that see nothing are zeros. Without ``with_lse`` no ``lse``."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    count = query.shape[2]
    # powers of two, so that few shapes are compiled; columns that are filled up cost no work
    rows = _power_of_two(max(count, _BLOCK))
    fill = rows - count
    more = _power_of_two(max(key.shape[2], 2 * rows)) - key.shape[2]
    query = functional.pad(query, (0, 0, 0, fill))
    key, value = (functional.pad(part, (0, 0, 0, more)) for part in (key, value))
    own = functional.pad(own, (0, fill), value=-1).int()
    columns = _Columns(*(functional.pad(x, (0, more), value=_NEVER).int() for x in columns))
    after, until = columns.after, columns.until

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (after[b, j] <= own[b, i]) & (own[b, i] < until[b, j])

    some, whole = _blocks(own, columns)
    mask = BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=seen,
        seq_lengths=(query.shape[2], key.shape[2]),
    )
    found = _COMPILED.run(
        query,
        key,
        value,
        score_mod=_modified(own, columns, scores),
        block_mask=mask,
        scale=scores.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        **({"return_aux": AuxRequest(lse=True)} if with_lse else {}),
    )
    if found is None:
        return None
    empty = (own < 0)[:, None, :count]
    output, lse = (found[0], found[1].lse) if with_lse else (found, None)
    output = output[:, :, :count].masked_fill(empty[..., None], 0.0)
    if lse is not None:
        lse = lse[:, :, :count].masked_fill(empty, -torch.inf)
    return Part(output, lse)  # type: ignore[arg-type]


def _modified(own: Tensor, columns: _Columns, scores: Scores) -> Callable[..., Tensor] | None:
    """ALiBi and soft-cap, if there is one."""
    slopes, softcap = scores.slopes, scores.softcap
    origin, most = columns.origin, columns.most
    if slopes is None and softcap is None:
        return None

    def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if slopes is not None:
            score = score - slopes[h] * torch.minimum(own[b, i] - origin[b, j], most[b, j])
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return modify


def _blocks(own: Tensor, columns: _Columns) -> tuple[Tensor, Tensor]:
    """Blocks ``(batch, query blocks, column blocks)`` of which something is seen, and all."""
    asked = own.unflatten(1, (-1, _BLOCK))
    low, high = asked.amin(-1)[..., None], asked.amax(-1)[..., None]
    after, until = (x.unflatten(1, (-1, _BLOCK)) for x in (columns.after, columns.until))
    some = (after.amin(-1)[:, None] <= high) & (until.amax(-1)[:, None] > low)
    whole = (after.amax(-1)[:, None] <= low) & (until.amin(-1)[:, None] > high)
    return some, whole


def _power_of_two(count: int) -> int:
    """The lowest that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many column blocks a query block sees, and which: those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int()[:, None], order.int()[:, None]


class _Compiled:
    """The kernel, compiled at its first call; not tried again where that failed."""

    def __init__(self) -> None:
        self.works = True

    @functools.cached_property
    def kernel(self) -> Callable[..., Any]:
        from torch.nn.attention.flex_attention import flex_attention

        # without ``fullgraph`` it would fall back, in silence, to holding all scores
        return torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run(self, *args: Any, **kwargs: Any) -> Any | None:
        """What the kernel gives; None if it cannot be compiled."""
        if not self.works:
            return None
        from torch._dynamo import config
        from torch._dynamo.exc import TorchDynamoException

        try:
            with config.patch(recompile_limit=_SHAPES):
                return self.kernel(*args, **kwargs)
        except TorchDynamoException:
            self.works = False
            return None


_COMPILED = _Compiled()
