"""Lambda attention in tiles of one window: two causal squares per tile, and no mask at all.

Cut the text into tiles of `window` tokens. Row r of a tile sees, of its own tile, the columns
c <= r, and of the tile before it the columns c > r (those nearer than `window`). The first is a
causal square. So is the second once rows and columns are counted from the end. Fused causal
attention skips what a causal square does not see, so the work is n x window pairs and none more,
and scores are never held. What a query sees in its tile, in the one before and of the sinks are
three partial softmaxes, joined by their log-sum-exps (`union`, see `memlm.ops.merge`).

A key is rotated once, by its place c in its tile. The queries of its own tile are rotated by r,
those of the next one by r + window: the distances come out right, and no position ever exceeds two
windows, however long the text is.

The fused kernel that also returns log-sum-exps is torch's own for CPUs; it has no gradient for
them, so training takes the blocked implementation, and so does a torch without this kernel.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.ops.lambda_rule import Keys, Scores, sink_part
from memlm.ops.parts import Part

_QUERIES = 8192  # of one pass; bounds what is held besides inputs and outputs
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"
_ARGUMENTS = (
    "(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, "
    "Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
)


def find_kernel(name: str) -> Any | None:
    """The fused attention of this torch; None if it has none of this name and these arguments.

    The operator is private, so another release may drop it or change it.
    """
    packet = getattr(torch.ops.aten, name, None)
    overload = getattr(packet, "default", None)
    return (
        overload if str(getattr(overload, "_schema", "")) == f"aten::{name}{_ARGUMENTS}" else None
    )


_attend = find_kernel(_KERNEL)


def can_tile(query: Tensor, positions: Tensor, keys: Keys, scores: Scores) -> bool:
    """Whether ``tiled`` computes this call; arguments as in ``window_attention``."""
    new, window = query.shape[2], scores.config.window
    past = keys.positions.shape[1] - new
    if (
        _attend is None
        or new < 2
        or past < 0
        or query.device.type != "cpu"
        or query.dtype not in _DTYPES
        or not query.dtype == keys.key.dtype == keys.value.dtype
        or query.shape[-1] != keys.value.shape[-1]
        or scores.slopes is not None
        or scores.softcap is not None
        or (torch.is_grad_enabled() and (query.requires_grad or keys.key.requires_grad))
    ):
        return False
    # either the text begins here, or a whole window lies before and most of the tile is filled
    if past and (past < window - 1 or new < window):
        return False
    reach = min(past, window - 1)
    start = int(positions[0, 0])
    if start < reach or (past == 0 and start != 0):
        return False
    steps = torch.arange(start - reach, start + new, device=positions.device)
    return bool(
        (positions == steps[reach:]).all() and (keys.positions[:, past - reach :] == steps).all()
    )


def tiled(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    sinks: Keys,
    scores: Scores,
    other: Part | None = None,
) -> Tensor:
    """As ``window_attention``, for what ``can_tile`` accepts."""
    new, past = query.shape[2], keys.positions.shape[1] - query.shape[2]
    tile = min(scores.config.window, new) if past == 0 else scores.config.window
    span = max(1, _QUERIES // tile) * tile
    outputs = []
    for begin in range(0, new, span):
        end = min(begin + span, new)
        first = max(past + begin - (tile - 1), 0)
        here = keys.narrow(first, past + end)
        asked, places = query[:, :, begin:end], positions[:, begin:end]
        beside = None if other is None else other.narrow(begin, end)
        outputs.append(_span(asked, places, here, sinks, scores, tile, beside))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _span(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    sinks: Keys,
    scores: Scores,
    tile: int,
    other: Part | None,
) -> Tensor:
    """Whole tiles, except that the last one may be cut; ``tile - 1`` keys or none lie before."""
    new = query.shape[2]
    before = keys.positions.shape[1] - new > 0
    tiles = -(-new // tile)
    fill = tiles * tile - new
    # the one column that a full past lacks is never seen, nor is what fills the last tile
    sides = (0, 0, int(before), fill)
    key, value = (torch.nn.functional.pad(part, sides) for part in keys[:2])
    places = torch.arange(key.shape[2], device=key.device) % tile
    places = places.expand(key.shape[0], -1)
    own = places[:, : tiles * tile]
    padded = torch.nn.functional.pad(query, (0, 0, 0, fill))

    key_tiles = _cut(scores.turn(key, places), tile)
    value_tiles = _cut(value, tile)
    first = 0 if before else 1  # the first tile of queries with one before it
    inner = _causal(
        _cut(scores.turn(padded, own), tile),
        key_tiles[:, 1 - first :],
        value_tiles[:, 1 - first :],
        scores.scale,
    )
    parts = [inner]
    if tile > 1 and tiles > first:
        outer = _causal(
            _cut(scores.turn(padded, own + tile), tile)[:, first:, :, :-1].flip(3),
            key_tiles[:, :-1, :, 1:].flip(3),
            value_tiles[:, :-1, :, 1:].flip(3),
            scores.scale,
        )
        parts.append(_aligned(outer, first))
    if other is not None:
        parts.append(_padded(other, tile, fill, inner[1].dtype))
    if sinks.positions.shape[1] == 0 or int(positions[0, -1]) < scores.config.window:
        return _joined(parts, new, query.dtype)
    parts.append(_padded(sink_part(query, positions, sinks, scores), tile, fill, inner[1].dtype))
    return _joined(parts, new, query.dtype)


def _cut(x: Tensor, tile: int) -> Tensor:
    """``(batch, heads, time, dim)`` to ``(batch, tiles, heads, tile, dim)``."""
    return x.unflatten(2, (-1, tile)).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Fused causal attention within tiles, with its log-sum-exps."""
    batch = query.shape[0]
    attend: Any = _attend  # ``can_tile`` has seen that it is there
    output, lse = attend(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), 0.0, True, scale=scale
    )
    return output.unflatten(0, (batch, -1)), lse.unflatten(0, (batch, -1))


def _padded(part: Part, tile: int, fill: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A part over all queries in tiles; ``fill`` more queries see nothing."""
    output = torch.nn.functional.pad(part.output, (0, 0, 0, fill))
    lse = torch.nn.functional.pad(part.lse.to(dtype), (0, fill), value=-torch.inf)
    return _cut(output, tile), lse.unflatten(2, (-1, tile)).transpose(1, 2)


def _aligned(part: tuple[Tensor, Tensor], first: int) -> tuple[Tensor, Tensor]:
    """Rows counted from the end, in the order of tiles again; others see nothing."""
    output, lse = part
    output = torch.nn.functional.pad(output.flip(3), (0, 0, 0, 1, 0, 0, first, 0))
    return output, torch.nn.functional.pad(lse.flip(3), (0, 1, 0, 0, first, 0), value=-torch.inf)


def _joined(parts: list[tuple[Tensor, Tensor]], new: int, dtype: torch.dtype) -> Tensor:
    """The union of partial softmaxes, ``(batch, heads, time, dim)``."""
    outputs, lses = zip(*parts, strict=True)
    total = torch.logsumexp(torch.stack(lses), dim=0)
    joined = sum(
        output * (lse - total).exp()[..., None].to(output.dtype)
        for output, lse in zip(outputs, lses, strict=True)
    )
    return joined.transpose(1, 2).flatten(2, 3)[:, :, :new].to(dtype)  # type: ignore[union-attr]
