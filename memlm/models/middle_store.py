"""Where an attention layer keeps its middle tokens: in blocks, growing or in a ring, on any device.

The token at position p of its row, `sinks` or more, belongs to block (p - sinks) // size, whatever
padding stands around it. Without a capacity block b lies in slot b, and slots double when they run
out. With one the slots are a ring, b in slot b mod slots: as many as hold the capacity, the window,
which a token enters long before it can be selected, the tokens written at once, and those that
``crop`` may take back. One last slot takes what is nowhere kept.

With ``offload`` all of it is in the memory of the CPU, bounds included, so that the device holds
the same after any length.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memlm.models.window_cache import scattered
from memlm.ops.lambda_rule import Keys, LambdaConfig
from memlm.ops.middle_attention import Blocks, bounds_of, middle_part, queries_at_once
from memlm.ops.middle_rule import MiddleConfig
from memlm.ops.parts import Part

_STATE = ("key", "value", "bounds", "lengths")
_WRITTEN = 64  # tokens at once, most, where there is a capacity


class MiddleStore:
    """The middle tokens of one layer.

    Attributes:
        config: of the middle.
        seen: window and sinks of the layer.
        spare: tokens that ``crop`` may take back.
        lengths: ``(rows,)`` int64: tokens of each row so far, padding not counted.
        key: as in `Blocks`.
        value: alike.
        bounds: alike.
    """

    lengths: Tensor
    key: Tensor
    value: Tensor
    bounds: Tensor

    def __init__(self, config: MiddleConfig, seen: LambdaConfig, spare: int = 0):
        self.config, self.seen, self.spare = config, seen, spare
        self.is_begun = False

    def begin(self, key: Tensor, value: Tensor) -> None:
        """Empty slots for the rows, heads and type of ``(rows, key heads, new, dim)``."""
        home = torch.device("cpu") if self.config.offload else key.device
        slots, size = 1, self.config.block
        if self.config.capacity is not None:
            held = self.config.capacity + self.seen.window + _WRITTEN + self.spare
            slots = held // size + 2
        shape = (*key.shape[:2], slots + 1, size)
        with torch.inference_mode(False):  # so that it can be written anywhere
            self.key, self.value = (
                torch.zeros(*shape, part.shape[3], dtype=part.dtype, device=home)
                for part in (key, value)
            )
            # single tokens are their own bounds
            self.bounds = self.key.new_zeros(*shape[:3], 2 * key.shape[3] if size > 1 else 0)
            self.lengths = torch.zeros(len(key), dtype=torch.long, device=home)
        self.is_begun = True

    def attend(self, query: Tensor, new: Keys, **how: Any) -> Part | None:
        """Take in the new tokens, and let their queries look back.

        Args:
            query: ``(rows, heads, new, dim)``, not rotated.
            new: keys and values of the same tokens, not rotated.
            how: rotation, slopes, scale and soft-cap, as in `memlm.ops.middle_attention`.

        Returns:
            What the middle gives them; None if it is empty for all of them.
        """
        if not self.is_begun:
            self.begin(new.key, new.value)
        anything = int(new.positions.max()) >= self.seen.window + self.seen.sinks
        every = anything and self.config.rule == "every"
        count = query.shape[2]
        # a ring must not lose what the earlier ones of many queries still look at
        step = count if self.config.capacity is None else _WRITTEN
        parts = []
        for start in range(0, count, step):
            here = new.narrow(start, start + step)
            self.write(here)
            if every:
                parts += self._looks(query[:, :, start : start + step], here.positions, **how)
        if every:
            return Part(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))
        return self._last_looks(query, new.positions, **how) if anything else None

    def write(self, new: Keys) -> None:
        """Keep tokens, whose positions are -1 for padding."""
        size, home = self.config.block, self.key.device
        positions = new.positions.to(home)
        self.lengths.clamp_(min=positions.amax(1) + 1)
        places = positions - self.seen.sinks
        if self.config.capacity is None:
            self._grow(int(places.max()) // size + 1)
        held = self.key.shape[2] - 1
        columns = torch.where(places >= 0, places % (held * size), held * size)
        self.key = _put(self.key, columns, new.key.to(home))
        self.value = _put(self.value, columns, new.value.to(home))
        if size > 1:
            self._bound(torch.where(places >= 0, places // size, -1))

    def blocks(self) -> Blocks:
        """What is held now."""
        held = self.key.shape[2] - 1
        slots = torch.arange(held, device=self.lengths.device)
        newest = (self.lengths - 1 - self.seen.sinks)[:, None] // self.config.block
        numbers = (newest - (newest - slots) % held).clamp(min=-1)
        return Blocks(self.key, self.value, self.bounds, numbers).first(held)

    def crop(self, count: int) -> None:
        """Take back the last ``count`` tokens, which are no padding in any row."""
        self.lengths.sub_(count).clamp_(min=0)

    def select_rows(self, rows: Tensor) -> None:
        """Keep the rows ``rows`` ``(kept,)``, which may repeat."""
        with torch.inference_mode(False):
            self.put(
                {name: x.index_select(0, rows.to(x.device)) for name, x in self.held().items()}
            )

    def held(self) -> dict[str, Tensor]:
        """Every tensor of the state, by its name; nothing if nothing was written."""
        return {name: getattr(self, name) for name in _STATE} if self.is_begun else {}

    def put(self, held: Mapping[str, Tensor]) -> None:
        """Take a state that ``held`` gave, on whatever device."""
        for name in _STATE:
            part = held[name]
            setattr(self, name, part.cpu() if self.config.offload else part)
        self.is_begun = True

    def _looks(self, query: Tensor, positions: Tensor, **how: Any) -> list[Part]:
        """Middle attention, a few queries at a time."""
        blocks, parts = self.blocks(), []
        step = queries_at_once(query, blocks, self.config)
        for asked, places in zip(
            query.split(step, dim=2), positions.split(step, dim=1), strict=True
        ):
            reached = blocks
            if self.config.capacity is None:  # slots are in order: leave out those to come
                far = int(places.max()) - self.seen.window - self.seen.sinks
                reached = blocks.first(max(far // self.config.block, 0) + 1)
            parts.append(middle_part(asked, places, reached, self.config, self.seen, **how))
        return parts

    def _last_looks(self, query: Tensor, positions: Tensor, **how: Any) -> Part:
        """Middle attention of the last query of every row; the others see nothing."""
        batch, heads, count, dim = query.shape
        last = positions.argmax(1, keepdim=True)
        index = last[:, None, :].expand(-1, heads, -1)
        asked = query.gather(2, index[..., None].expand(-1, -1, -1, dim))
        (part,) = self._looks(asked, positions.gather(1, last), **how)
        if count == 1:
            return part
        output = part.output.new_zeros(batch, heads, count, part.output.shape[3])
        lse = part.lse.new_full((batch, heads, count), -torch.inf)
        wide = index[..., None].expand(-1, -1, -1, output.shape[3])
        return Part(output.scatter(2, wide, part.output), lse.scatter(2, index, part.lse))

    def _grow(self, needed: int) -> None:
        """At least ``needed`` slots and the last one; twice as many as before."""
        held = self.key.shape[2] - 1
        if needed <= held:
            return
        more = max(needed, 2 * held) - held
        with torch.inference_mode(False):
            self.key, self.value, self.bounds = (
                torch.cat([part, part.new_zeros(*part.shape[:2], more, *part.shape[3:])], dim=2)
                for part in (self.key, self.value, self.bounds)
            )

    def _bound(self, numbers: Tensor) -> None:
        """Bounds of the blocks ``numbers`` ``(rows, new)``, which have changed; -1: none."""
        held = self.key.shape[2] - 1
        last = numbers.amax(1, keepdim=True)
        first = torch.where(numbers >= 0, numbers, last).amin(1, keepdim=True)
        changed = first + torch.arange(int((last - first).max()) + 1, device=numbers.device)
        slots = torch.where((changed <= last) & (changed >= 0), changed % held, held)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.bounds[rows, :, slots] = bounds_of(self.key[rows, :, slots])


def _put(held: Tensor, columns: Tensor, new: Tensor) -> Tensor:
    """``new`` ``(rows, heads, new, dim)`` put at ``columns`` of the tokens of all blocks."""
    index = columns[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    tokens = held.flatten(2, 3)
    written = scattered(tokens, index, new)
    return held if written is tokens else written.unflatten(2, held.shape[2:4])
