"""What Lambda attention sees, and at which distance: the rule, its keys and the scores of sinks.

The rule itself is stated in `memlm.ops.window_attention`; this file holds what its implementations
share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.parts import Part

Clamp = Literal["causal", "original", "streaming"]
# rotate(x (batch, heads, time, dim), positions (batch, time)) -> x rotated by its positions
Rotate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LambdaConfig(Config):
    """What Lambda attention sees.

    Attributes:
        window: keys seen at their true distance, the query's own included; at least 1.
        sinks: first tokens seen from beyond the window; 0 is a plain sliding window.
        pinned: spans ``(begin, end)`` of later positions that are sinks too, as a system prompt in
            the middle of a text: tokens ``begin`` to ``end - 1`` of every row, in order.
        distance_limit: largest distance at which a sink is scored; None: its true distance.
        clamp: ``"causal"``: a sink at distance d is scored at ``min(d, distance_limit)``;
            ``"original"``: every sink at ``min(distance_limit, length - 1)``, as the paper's code;
            ``"streaming"``: at its distance among the keys that are still there, as StreamingLLM
            (Xiao et al. 2024) does: sink g at ``min(i, sinks + window - 1) - g``, without a limit.
    """

    window: int
    sinks: int = 10
    distance_limit: int | None = None
    clamp: Clamp = "causal"
    pinned: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check(self.window >= 1, f"window must be at least 1, got {self.window}")
        check(self.sinks >= 0, f"sinks must not be negative, got {self.sinks}")
        limit = self.distance_limit
        check(
            limit is None or limit >= 1, f"distance_limit must be at least 1 or None, got {limit}"
        )
        check(
            self.clamp in get_args(Clamp),
            f"clamp must be 'causal', 'original' or 'streaming', got {self.clamp!r}",
        )
        check(
            limit is None or self.clamp != "streaming",
            f"clamp='streaming' has distances of its own, got distance_limit={limit}; pass None",
        )
        ends = (self.sinks, *(end for _, end in self.pinned))
        gaps = zip(ends, self.pinned, strict=False)
        check(
            all(last <= begin < end for last, (begin, end) in gaps),
            f"pinned spans must be (begin, end) with begin < end, in order, apart, and behind the "
            f"first {self.sinks} tokens, got {self.pinned}",
        )
        check(
            not (self.pinned and self.clamp == "streaming"),
            "clamp='streaming' counts what is kept from the beginning of the text, got pinned "
            f"spans {self.pinned}; use clamp='causal'",
        )

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """All spans of positions that are sinks, the first tokens included."""
        return (*(((0, self.sinks),) if self.sinks else ()), *self.pinned)

    @property
    def kept(self) -> int:
        """How many tokens are sinks."""
        return sum(end - begin for begin, end in self.spans)


class Keys(NamedTuple):
    """Keys with their values and places.

    Attributes:
        key: ``(batch, key heads, keys, dim)``, not rotated.
        value: ``(batch, key heads, keys, value dim)``.
        positions: ``(batch, keys)`` int64, the place in its row, -1 for padding; real ones of a
            row differ and rise.
    """

    key: Tensor
    value: Tensor
    positions: Tensor

    def narrow(self, begin: int, end: int) -> "Keys":
        """The columns ``begin`` to ``end``."""
        return Keys(
            self.key[:, :, begin:end], self.value[:, :, begin:end], self.positions[:, begin:end]
        )

    def select(self, columns: Tensor) -> "Keys":
        """Other columns in every row: ``columns`` is ``(batch, chosen)``."""
        index = columns[:, None, :, None]
        return Keys(
            self.key.gather(2, index.expand(-1, self.key.shape[1], -1, self.key.shape[3])),
            self.value.gather(2, index.expand(-1, self.value.shape[1], -1, self.value.shape[3])),
            self.positions.gather(1, columns),
        )


def first_keys(keys: Keys, count: int) -> Keys:
    """The keys at positions 0 to ``count - 1`` of every row, as ``sink_keys``."""
    return sink_keys(keys, LambdaConfig(window=1, sinks=count))


def sink_keys(keys: Keys, config: LambdaConfig) -> Keys:
    """The keys of all sinks.

    Returns:
        ``config.kept`` columns; position -1 where the row has no such key.
    """
    batch, columns = keys.positions.shape
    numbers = sink_numbers(keys.positions, config)
    # the last column takes what is no sink
    numbers = torch.where(numbers < 0, config.kept, numbers)
    shape = (batch, config.kept + 1)
    places = keys.positions.new_full(shape, -1).scatter(1, numbers, keys.positions)
    if columns == 0:
        key, value = (
            part.new_zeros(*part.shape[:2], config.kept, part.shape[3]) for part in keys[:2]
        )
        return Keys(key, value, places[:, :-1])
    order = torch.arange(columns, device=places.device).expand(batch, -1)
    where = torch.zeros_like(places).scatter(1, numbers, order)
    return keys.select(where[:, :-1])._replace(positions=places[:, :-1])


def sink_numbers(positions: Tensor, config: LambdaConfig) -> Tensor:
    """Which sink a token is, counted over all spans; -1: none. Same shape as ``positions``."""
    numbers, before = torch.full_like(positions, -1), 0
    for begin, end in config.spans:
        inside = (positions >= begin) & (positions < end)
        numbers = torch.where(inside, positions - begin + before, numbers)
        before += end - begin
    return numbers


class Scores(NamedTuple):
    """How dot products become scores.

    Attributes:
        config: what is seen.
        limit: largest distance of a sink in this call.
        rotate: rotary embedding or None.
        slopes: ``(heads,)`` of ALiBi or None.
        scale: of the dot products.
        softcap: or None.
    """

    config: LambdaConfig
    limit: int | None
    rotate: Rotate | None
    slopes: Tensor | None
    scale: float
    softcap: float | None

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` ``(batch, heads, time, dim)`` rotated by its positions."""
        return x if self.rotate is None else self.rotate(x, positions)

    def finish(self, dots: Tensor, distance: Tensor, seen: Tensor) -> Tensor:
        """Dot products ``(batch, key heads, group, queries, keys)`` become masked scores."""
        dots = dots * self.scale
        if self.slopes is not None:
            slopes = self.slopes.to(dots).view(1, *dots.shape[1:3], 1, 1)
            dots = dots - slopes * distance[:, None, None]
        if self.softcap is not None:
            dots = self.softcap * torch.tanh(dots / self.softcap)
        return dots.masked_fill(~seen[:, None, None], -torch.inf)


def sink_scores(query: Tensor, positions: Tensor, sinks: Keys, scores: Scores) -> Tensor:
    """Scores of sinks, -inf where a query sees none.

    Args:
        query: ``(batch, heads, queries, dim)``, not rotated.
        positions: ``(batch, queries)``.
        sinks: from ``first_keys``.
        scores: how.

    Returns:
        ``(batch, key heads, group, queries, sinks)``.
    """
    window, limit = scores.config.window, scores.limit
    distance = positions[:, :, None] - sinks.positions[:, None, :]
    seen = (distance >= window) & (positions >= 0)[:, :, None] & (sinks.positions >= 0)[:, None, :]
    sinks = sinks._replace(key=sinks.key.to(query.dtype))
    if scores.config.clamp == "streaming":
        near = positions.clamp(max=window + scores.config.sinks - 1)
        distance = near[:, :, None] - sinks.positions[:, None, :]
        return scores.finish(_true_dots(query, near, sinks, scores), distance, seen)
    if limit is None:
        return scores.finish(_true_dots(query, positions, sinks, scores), distance, seen)
    still = scores.turn(sinks.key, torch.zeros_like(sinks.positions))
    far = grouped_dots(scores.turn(query, torch.full_like(positions, limit)), still)
    if limit <= window or scores.config.clamp == "original":
        return scores.finish(far, torch.full_like(distance, limit), seen)
    dots = torch.where(
        (distance < limit)[:, None, None], _true_dots(query, positions, sinks, scores), far
    )
    return scores.finish(dots, distance.clamp(max=limit), seen)


def _true_dots(query: Tensor, positions: Tensor, sinks: Keys, scores: Scores) -> Tensor:
    """Products at true distances, those beyond a limit left open; relative to each span."""
    parts, before = [], 0
    for begin, end in scores.config.spans:
        here = sinks.narrow(before, before + end - begin)
        before += end - begin
        # beyond the limit the true distance is not used, so the query need not be rotated further
        most = None if scores.limit is None else scores.limit + end - begin
        turned = scores.turn(query, (positions - begin).clamp(min=0, max=most))
        key = scores.turn(here.key, (here.positions - begin).clamp(min=0))
        parts.append(grouped_dots(turned, key))
    return torch.cat(parts, dim=-1)


def sink_part(query: Tensor, positions: Tensor, sinks: Keys, scores: Scores) -> Part:
    """What sinks alone give these queries, in float32 at least; arguments as in `sink_scores`."""
    work = torch.promote_types(query.dtype, torch.float32)
    rows = sink_scores(query.to(work), positions, sinks, scores)
    empty = torch.isneginf(rows).all(-1, keepdim=True)
    weights = torch.softmax(rows.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    output = weights.flatten(2, 3) @ sinks.value.to(work)
    output = output.unflatten(2, rows.shape[2:4]).flatten(1, 2)
    return Part(output, safe_logsumexp(rows).flatten(1, 2))


def reach(positions: Tensor, places: Tensor, begin: int, window: int) -> tuple[int, int]:
    """The columns from ``begin`` on that some query sees in its window.

    Args:
        positions: ``(batch, queries)`` of queries.
        places: ``(batch, keys)``: positions of keys.
        begin: the first column to look at.
        window: how far a query sees.
    """
    low = first_real(positions)
    high = positions.amax(-1, keepdim=True)
    # low is huge in rows without a query: they ask for nothing
    seen = (places >= 0) & (places > low - window) & (places <= high)
    columns = seen[:, begin:].any(0).nonzero()
    if len(columns) == 0:
        return begin, begin
    return begin + int(columns[0]), begin + int(columns[-1]) + 1


def first_real(positions: Tensor) -> Tensor:
    """``(batch, 1)``: the lowest position that is no padding; huge where there is none."""
    huge = torch.iinfo(positions.dtype).max
    return torch.where(positions >= 0, positions, huge).amin(-1, keepdim=True)


def before_window(positions: Tensor, window: int) -> Tensor:
    """``(batch, 1)``: the position just before all that these queries see in their windows.

    Relative to it positions are small, however long the text is.
    """
    low = first_real(positions)
    return torch.where(low < torch.iinfo(low.dtype).max, low, 0) - window


def grouped_dots(query: Tensor, key: Tensor) -> Tensor:
    """``(batch, key heads, group, queries, keys)``: heads of a group share their key."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return (grouped.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])
