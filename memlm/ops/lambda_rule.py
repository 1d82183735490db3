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

Clamp = Literal["causal", "original", "streaming"]
# rotate(x (batch, heads, time, dim), positions (batch, time)) -> x rotated by its positions
Rotate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LambdaConfig(Config):
    """What Lambda attention sees.

    Attributes:
        window: keys seen at their true distance, the query's own included; at least 1.
        sinks: first tokens seen from beyond the window; 0 is a plain sliding window.
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
    """The keys at positions 0 to ``count - 1`` of every row.

    Returns:
        ``count`` columns; position -1 where the row has no such key.
    """
    batch, columns = keys.positions.shape
    places = torch.arange(count, device=keys.positions.device)
    if columns == 0:
        return Keys(
            keys.key.new_zeros(*keys.key.shape[:2], count, keys.key.shape[3]),
            keys.value.new_zeros(*keys.value.shape[:2], count, keys.value.shape[3]),
            places.new_full((batch, count), -1),
        )
    here = keys.positions[:, None, :] == places[:, None]
    found = keys.select(here.int().argmax(-1))
    return found._replace(positions=torch.where(here.any(-1), places, -1))


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
    key = sinks.key.to(query.dtype)
    if scores.config.clamp == "streaming":
        near = positions.clamp(max=window + scores.config.sinks - 1)
        distance = near[:, :, None] - sinks.positions[:, None, :]
        return scores.finish(_true_dots(query, near, key, sinks, scores), distance, seen)
    if limit is None:
        return scores.finish(_true_dots(query, positions, key, sinks, scores), distance, seen)
    still = scores.turn(key, torch.zeros_like(sinks.positions))
    far = grouped_dots(scores.turn(query, torch.full_like(positions, limit)), still)
    if limit <= window or scores.config.clamp == "original":
        return scores.finish(far, torch.full_like(distance, limit), seen)
    # beyond the limit the true distance is not used, so the query need not be rotated further
    near = positions.clamp(max=limit + int(sinks.positions.max().clamp(min=0)))
    true = _true_dots(query, near, key, sinks, scores)
    dots = torch.where((distance < limit)[:, None, None], true, far)
    return scores.finish(dots, distance.clamp(max=limit), seen)


def _true_dots(
    query: Tensor, positions: Tensor, key: Tensor, sinks: Keys, scores: Scores
) -> Tensor:
    turned = scores.turn(query, positions.clamp(min=0))
    return grouped_dots(turned, scores.turn(key, sinks.positions.clamp(min=0)))


def grouped_dots(query: Tensor, key: Tensor) -> Tensor:
    """``(batch, key heads, group, queries, keys)``: heads of a group share their key."""
    grouped = query.unflatten(1, (key.shape[1], -1))
    return (grouped.flatten(2, 3) @ key.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])
