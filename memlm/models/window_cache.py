"""A cache layer of constant size: the sinks, and a ring of the latest keys that nothing moves.

Lambda attention never looks at anything else, so a sequence of any length needs

    2 * rows * key heads * (sinks + window + SPARE + 1) * dim

numbers per layer, allocated once; pinned spans count among the sinks. A token at position p of its
row goes to slot p mod (window + SPARE) of the ring, whatever padding stands around it, and sinks
also to slots of their own; padding goes to one last column that nobody reads. Spare slots let
``crop`` take back tokens, as assisted and prompt-lookup decoding do. Keys of the ring are rotated
by their slots, see `memlm.ops.window_step`.

A step of one token can be compiled (`torch.compile`): nothing is allocated again, no number goes to
Python, and its shapes stay as they are.

The layer belongs to an ordinary Hugging Face cache, so beams reorder it and `generate` repeats and
selects its rows. `memlm.models.window_file` puts it on disk.

Differs from the paper's code: that one keeps every key and rotates all of them at every step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from memlm.core.errors import InputError
from memlm.ops.lambda_rule import Keys, LambdaConfig, Rotate, sink_numbers
from memlm.ops.window_attention import Impl, window_attention
from memlm.ops.window_step import step_attention

SPARE = 64


class WindowLayer(CacheLayerMixin):
    """Sinks and ring of one attention layer.

    Attributes:
        config: what the layer sees.
        slots: of the ring.
        seen: ``()`` int64, tokens seen so far, padding included.
        positions: ``(rows, sinks + slots + 1)`` int64, the place in its row of what a column
            holds; -1: nothing.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    keys: Any
    values: Any
    seen: Tensor
    positions: Tensor

    def __init__(self, config: LambdaConfig):
        super().__init__()
        self.config = config
        self.slots = config.window + SPARE
        self._length: int | None = 0

    @property
    def length(self) -> int:
        """Tokens seen so far, padding included."""
        if self._length is None:  # a compiled step has counted
            self._length = int(self.seen)
        return self._length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty slots for the rows and on the device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        columns = self.config.kept + self.slots + 1
        shape = (len(key_states), columns)
        with torch.inference_mode(False):  # so that it can be written anywhere
            self.keys, self.values = (
                torch.zeros(
                    *part.shape[:2], columns, part.shape[3], dtype=part.dtype, device=part.device
                )
                for part in (key_states, value_states)
            )
            self.positions = torch.full(shape, -1, dtype=torch.long, device=self.device)
            self.seen = torch.zeros((), dtype=torch.long, device=self.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count new keys and values ``(rows, key heads, new, dim)`` and hand them on.

        ``attend`` takes them in: only the attention knows how they are rotated.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.count(key_states.shape[2])
        return key_states, value_states

    def count(self, tokens: int) -> None:
        """``tokens`` more have been seen."""
        # a number in Python would have a compiled step compiled anew whenever it changes
        self._length = None if torch.compiler.is_compiling() else self.length + tokens
        self.seen.add_(tokens)

    def attend(self, query: Tensor, new: Keys, impl: Impl = "auto", **how: Any) -> Tensor:
        """Attention of the new tokens over themselves and what is held; then they are held too.

        Args:
            query: ``(rows, heads, new, dim)``, not rotated.
            new: keys and values of the same tokens, not rotated.
            impl: for more than one token, as in ``window_attention``.
            how: rotation, slopes, scale and soft-cap, as in ``window_attention``.

        Returns:
            ``(rows, heads, new, value dim)``.
        """
        rotate: Rotate | None = how.get("rotate")
        self._write(new, sink_numbers(new.positions, self.config))
        kept = self.config.kept
        if query.shape[2] == 1:
            self._hold(new, rotate)
            # compiled, all slots, so that shapes stay as they are
            ring = self.slots if torch.compiler.is_compiling() else min(self.length, self.slots)
            held = self._columns(0, kept + ring)
            return step_attention(query, new.positions, held, self.slots, self.config, **how)
        before = self.length - query.shape[2]
        keys = _join(self._window(min(before, self.slots), rotate), new) if before else new
        sinks = self._columns(0, kept)
        output = window_attention(query, new.positions, keys, sinks, self.config, impl=impl, **how)
        self._hold(new, rotate)
        return output

    def get_seq_length(self) -> Any:
        """Tokens seen so far, padding included; while compiling, as a tensor."""
        if torch.compiler.is_compiling() and self.is_initialized:
            return self.seen
        return self.length

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that keeps everything, so that masks keep their usual shape."""
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self._length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, which are no padding in any row.

        Raises:
            InputError: for a positive number, or more tokens than the spare slots still allow.
        """
        count = -tokens_to_remove
        if count < 0:
            raise InputError(
                "crop must be given minus the number of tokens to take back, got "
                f"{tokens_to_remove}; pass a negative number"
            )
        if count == 0 or not self.is_initialized:
            return
        if count > self.length or (self.length > self.slots and count > SPARE + 1):
            raise InputError(
                f"a rolling window of {self.config.window} can take back up to "
                f"{min(self.length, SPARE + 1)} tokens, got {count}; have an assistant propose "
                "fewer tokens at once"
            )
        last = self.positions.amax(1, keepdim=True)
        self.positions.masked_fill_(self.positions > last - count, -1)
        self.count(-count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` continues what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.is_initialized:
            self._replace(lambda part: part[indices.to(part.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies beside each other."""
        if self.is_initialized:
            self._replace(lambda part: part.repeat_interleave(repeats, dim=0))

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is held."""
        with torch.inference_mode(False):
            kept = (self.keys, self.values, self.positions)
            self.keys, self.values, self.positions = (change(part) for part in kept)

    def _columns(self, begin: int, end: int) -> Keys:
        return Keys(self.keys, self.values, self.positions).narrow(begin, end)

    def _window(self, width: int, rotate: Rotate | None) -> Keys:
        """The first ``width`` slots of the ring, unrotated, in the order of positions."""
        ring = self._columns(self.config.kept, self.config.kept + width)
        if rotate is not None:
            slots = torch.arange(width, device=self.positions.device).expand(len(ring.key), -1)
            # the rotation may scale too (YaRN), once on the way in and once on the way back
            twice = torch.ones_like(ring.key[:1, :1, :1])
            for _ in range(2):
                twice = rotate(twice, slots[:1, :1] * 0)
            ring = ring._replace(key=rotate(ring.key, -slots) / twice)
        return ring.select(ring.positions.argsort(dim=1))

    def _hold(self, new: Keys, rotate: Rotate | None) -> None:
        """Write the latest tokens into their slots; others go to the last column."""
        slots = new.positions.clamp(min=0) % self.slots
        # a slot may come twice in a long piece: only its latest token counts
        latest = new.positions > new.positions.amax(1, keepdim=True) - self.slots
        columns = torch.where(latest & (new.positions >= 0), self.config.kept + slots, -1)
        if rotate is not None:
            new = new._replace(key=rotate(new.key, slots))
        self._write(new, columns)

    def _write(self, new: Keys, columns: Tensor) -> None:
        """Put tokens into ``columns`` ``(rows, new)``; -1: into the one that nobody reads."""
        unread = self.config.kept + self.slots
        columns = torch.where(columns < 0, unread, columns)
        index = columns[:, None, :, None]
        self.keys, self.values = (
            scattered(held, index.expand(-1, part.shape[1], -1, part.shape[3]), part)
            for held, part in ((self.keys, new.key), (self.values, new.value))
        )
        self.positions.scatter_(1, columns, new.positions.masked_fill(columns == unread, -1))


def scattered(held: Tensor, index: Tensor, part: Tensor) -> Tensor:
    """``part`` put into columns of ``held``: in place, unless a gradient has to pass."""
    if torch.is_grad_enabled() and (held.requires_grad or part.requires_grad):
        return held.scatter(2, index, part)
    return held.scatter_(2, index, part.to(held.dtype))


def _join(left: Keys, right: Keys) -> Keys:
    return Keys(
        torch.cat([left.key, right.key], dim=2),
        torch.cat([left.value, right.value], dim=2),
        torch.cat([left.positions, right.positions], dim=1),
    )
