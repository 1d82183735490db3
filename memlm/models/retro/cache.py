"""What a RETRO model remembers between steps of decoding.

Beside the keys and values of self-attention, three things, all with one row per sequence:

    tail        the decoder's states of the latest m - 1 tokens, where the encoder looks at a
                chunk: with the next tokens they make the chunk that ends next
    neighbours  per layer of cross-attention, keys and values of the neighbours of the *current*
                chunk only, the null key in front; made once when the chunk ends, read by every step
    current     which rows have a current chunk at all

so the encoder runs once per chunk, and a step costs what its own token costs. Beams reorder and
repeat all of it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from memlm.core.errors import UnsupportedModelError
from memlm.models.cache import CarryingCache


class Memory:
    """Keys and values of one layer's cross-attention; rows are sequences or chunks.

    Attributes:
        key: ``(rows, heads, 1 + k * length, dim)``, the null key first.
        value: alike.
        visible: ``(rows, 1 + k * length)`` bool.
    """

    def __init__(self, key: Tensor, value: Tensor, visible: Tensor):
        self.key, self.value, self.visible = key, value, visible

    def rows(self, index: Tensor) -> "Memory":
        """Some rows, in an order."""
        return Memory(self.key[index], self.value[index], self.visible[index])

    def widened(self, keys: int) -> "Memory":
        """With unseen keys behind, until there are ``keys``."""
        more = keys - self.visible.shape[1]
        return Memory(
            F.pad(self.key, (0, 0, 0, more)),
            F.pad(self.value, (0, 0, 0, more)),
            F.pad(self.visible, (0, more)),
        )

    def __add__(self, other: "Memory") -> "Memory":
        """Rows of both."""
        keys = max(self.visible.shape[1], other.visible.shape[1])
        a, b = self.widened(keys), other.widened(keys)
        return Memory(
            torch.cat([a.key, b.key]),
            torch.cat([a.value, b.value]),
            torch.cat([a.visible, b.visible]),
        )


class RetroCache(CarryingCache):
    """Keys and values of a model's past, and of the neighbours of its current chunks.

    Attributes:
        neighbours: layer index to `Memory`; empty before the first chunk with neighbours.
        tail: ``(batch, up to m - 1, dim)`` or None before the first token.
        current: ``(batch,)`` bool, or None before the first chunk with neighbours.
    """

    def __init__(self, inner: Cache | None = None):
        """Around ``inner``; None: around a new growing cache."""
        super().__init__(DynamicCache() if inner is None else inner)
        self.neighbours: dict[int, Memory] = {}
        self.tail: Tensor | None = None
        self.current: Tensor | None = None

    def around(self, inner: Cache) -> "RetroCache":
        """What this cache carries, around the layers of another."""
        cache = RetroCache(inner)
        cache.neighbours, cache.tail, cache.current = self.neighbours, self.tail, self.current
        return cache

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: neighbours of chunks that have passed are not kept.

        Raises:
            UnsupportedModelError: always.
        """
        raise UnsupportedModelError(
            "a RETRO cache must only grow, since neighbours of past chunks are not kept, but "
            "tokens were to be taken back; generate without assisted decoding"
        )

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.neighbours, self.tail, self.current = {}, None, None

    def _rows(self) -> int:
        return 0 if self.tail is None else len(self.tail)

    def _select(self, index: Tensor) -> None:
        if self.tail is not None:
            self.tail = self.tail[index.to(self.tail.device)]
        if self.current is not None:
            self.current = self.current[index.to(self.current.device)]
        self.neighbours = {
            layer: memory.rows(index.to(memory.key.device))
            for layer, memory in self.neighbours.items()
        }
