"""A cache layer of constant size: the sinks and the last `window - 1` keys, not rotated.

Lambda attention never looks at anything else, so a sequence of any length needs

    2 * rows * key heads * (sinks + window - 1) * dim

numbers per layer. Sinks have their own slots, filled as the first real tokens come, row by row
under padding; each key travels with its position. The layer belongs to an ordinary Hugging Face
cache, so beams reorder it and `generate` repeats and selects its rows.

Differs from the paper's code: that one keeps every key and rotates all of them at every step.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from memlm.core.errors import UnsupportedModelError
from memlm.ops.window_attention import Keys, LambdaConfig, first_keys


class WindowLayer(CacheLayerMixin):
    """Sinks and a rolling window of one attention layer.

    Attributes:
        incoming: ``(rows, new)`` positions of the tokens that the next ``update`` brings.
        seen: positions of the columns that the last ``update`` returned, sinks first.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False

    keys: Any
    values: Any
    positions: Tensor
    incoming: Tensor
    seen: Tensor

    def __init__(self, config: LambdaConfig):
        super().__init__()
        self.config = config
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty slots on the device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        none = Keys(
            key_states[:, :, :0],
            value_states[:, :, :0],
            self.incoming.new_zeros(len(key_states), 0),
        )
        self._keep(first_keys(none, self.config.sinks), none)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in new keys and values ``(rows, key heads, new, dim)``.

        Returns:
            Keys and values of ``sinks`` slots, the window so far, and the new tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        sinks, window = self.split(self.keys, self.values, self.positions)
        new = Keys(key_states, value_states, self.incoming)
        window = _join(window, new)
        if self.config.sinks:
            sinks = _fill(sinks, first_keys(window, self.config.sinks))
        everything = _join(sinks, window)
        self.seen = everything.positions
        self.length += key_states.shape[2]
        self._keep(sinks, _last(window, self.config.window - 1))
        return everything.key, everything.value

    def split(self, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Keys, Keys]:
        """The slots of the sinks, and the other columns."""
        joined = Keys(key, value, positions)
        sinks = self.config.sinks
        return joined.narrow(0, sinks), joined.narrow(sinks, positions.shape[1])

    def get_seq_length(self) -> int:
        """Tokens seen so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """There is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a cache that keeps everything, so that masks keep their usual shape."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0

    def crop(self, *_: Any) -> None:
        """Refused: what the window has dropped cannot come back.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "a rolling window cannot take back tokens, which assisted and prompt-lookup decoding "
            "do; decode without an assistant, or call restore_context(model) first"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` continues what row ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        if self.is_initialized:
            kept = (self.keys, self.values, self.positions)
            self.keys, self.values, self.positions = (
                part[indices.to(part.device)] for part in kept
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies beside each other."""
        if self.is_initialized:
            kept = (self.keys, self.values, self.positions)
            self.keys, self.values, self.positions = (
                part.repeat_interleave(repeats, dim=0) for part in kept
            )

    def _keep(self, sinks: Keys, window: Keys) -> None:
        self.keys, self.values, self.positions = _join(sinks, window)


def _join(left: Keys, right: Keys) -> Keys:
    return Keys(
        torch.cat([left.key, right.key], dim=2),
        torch.cat([left.value, right.value], dim=2),
        torch.cat([left.positions, right.positions], dim=1),
    )


def _fill(slots: Keys, found: Keys) -> Keys:
    """Slots that are still empty take what was found for them."""
    empty = slots.positions < 0
    wide = empty[:, None, :, None]
    return Keys(
        torch.where(wide, found.key, slots.key),
        torch.where(wide, found.value, slots.value),
        torch.where(empty, found.positions, slots.positions),
    )


def _last(keys: Keys, count: int) -> Keys:
    """The last ``count`` real keys of every row, in order."""
    columns = keys.positions.shape[1]
    if columns <= count:
        return keys
    last = keys.narrow(columns - count, columns)
    if bool((last.positions >= 0).all()):
        return last
    # padding on the right, or between turns: real keys may lie further back
    return keys.select(keys.positions.topk(count, dim=1).indices.sort(dim=1).values)
