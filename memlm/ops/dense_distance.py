"""Attention to every earlier key, with a limit on distances: LM-Infinite without its window.

Query i sees every key j <= i at distance d = i - j:

    score(i, j) = <R(min(d, limit)) q_i, k_j> * scale - slope * min(d, limit)

The number of tokens under the softmax still grows with the length. A triangle offset t lessens it:
of the c = i - window + 1 - sinks middle keys (index `sinks` to i - window) every score loses
t ln c, so that with t = 1 all of them together weigh as much as one (Han et al. 2024, the slower
path of their code). Time and memory are n x n: this is for comparison, `window_attention` for use.

Differs from the paper's code under ``rule="correct"``: distances are limited, whatever the window.
``rule="original"`` does as the code does: for rotary models the score of d < window at its true
distance and that of d >= limit at the limit are *added* (both for limit <= d < window, none for
window <= d < limit), and for ALiBi distances are limited to ``limit - 1``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.ops.window_attention import Keys, Rotate


@dataclass(frozen=True)
class DenseConfig(Config):
    """What dense attention with limited distances does.

    Attributes:
        window: where the middle ends; the limit does not depend on it, unless as in the original.
        sinks: where the middle begins.
        distance_limit: largest distance; None: no limit.
        triangle_offset: t above; 0 is off.
        rule: ``"correct"`` or ``"original"``, see above.
    """

    window: int
    sinks: int = 0
    distance_limit: int | None = None
    triangle_offset: float = 0.0
    rule: Literal["correct", "original"] = "correct"

    def __post_init__(self) -> None:
        check(self.window >= 1, f"window must be at least 1, got {self.window}")
        check(self.sinks >= 0, f"sinks must not be negative, got {self.sinks}")
        limit = self.distance_limit
        check(
            limit is None or limit >= 1, f"distance_limit must be at least 1 or None, got {limit}"
        )
        check(
            self.triangle_offset >= 0,
            f"triangle_offset must not be negative, got {self.triangle_offset}",
        )
        check(
            self.rule in ("correct", "original"),
            f"rule must be 'correct' or 'original', got {self.rule!r}",
        )


def dense_attention(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    config: DenseConfig,
    *,
    rotate: Rotate | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention to all earlier keys at limited distances; arguments as in ``window_attention``.

    Returns:
        ``(batch, heads, queries, value dim)`` in the dtype of ``value``; zeros for padding.
    """
    work = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // keys.key.shape[1]
    query, key = query.to(work), keys.key.to(work).repeat_interleave(groups, 1)
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    distance = positions[:, :, None] - keys.positions[:, None, :]
    seen = (distance >= 0) & (positions >= 0)[:, :, None] & (keys.positions >= 0)[:, None, :]

    scores = _dots(query, positions, key, keys.positions, distance, config, rotate) * scale
    if slopes is not None:
        limit = config.distance_limit
        if limit is not None:
            distance = distance.clamp(max=limit - (config.rule == "original"))
        scores = scores - slopes.to(work)[:, None, None] * distance[:, None]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if config.triangle_offset:
        middle = (positions - config.window + 1 - config.sinks)[:, :, None]
        within = (keys.positions >= config.sinks)[:, None, :] & (
            keys.positions[:, None, :] <= (positions - config.window)[:, :, None]
        )
        offset = config.triangle_offset * middle.clamp(min=1).to(work).log()
        scores = scores - (offset * within)[:, None]
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    empty = ~seen.any(-1)[:, None, :, None]
    weights = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    value = keys.value.to(work).repeat_interleave(groups, 1)
    return (weights @ value).to(keys.value.dtype)


def _dots(
    query: Tensor,
    positions: Tensor,
    key: Tensor,
    places: Tensor,
    distance: Tensor,
    config: DenseConfig,
    rotate: Rotate | None,
) -> Tensor:
    """``(batch, heads, queries, keys)`` products, every key turned to its limited distance."""
    if rotate is None:
        return query @ key.transpose(-1, -2)
    turned = rotate(query, positions.clamp(min=0))
    near = turned @ rotate(key, places.clamp(min=0)).transpose(-1, -2)
    limit = config.distance_limit
    if limit is None:
        return near
    still = rotate(key, torch.zeros_like(places)).transpose(-1, -2)
    far = rotate(query, torch.full_like(positions, limit)) @ still
    if config.rule == "correct":
        return torch.where((distance < limit)[:, None], near, far)
    return near * (distance < config.window)[:, None] + far * (distance >= limit)[:, None]
