"""Layers of RETRO's decoder: self-attention, chunked cross-attention, feed-forward, in this order.

    x = x + self-attention(norm x)
    x = x + cross-attention(norm x, neighbours)    in some layers, if there is retrieval
    x = x + feed-forward(norm x)                   (or norms behind the sums)

(Borgeaud et al. 2022, algorithm 1.) A query of chunk u, w tokens after the chunk's end, has
position m - 1 + w, keys of every neighbour have positions 0, 1, ...: distances are counted from
the chunk's first token, as in the paper's appendix B.1.2. A learnt null key, not rotated and
always seen, stands in front of the neighbours. Tokens that have no chunk get exactly nothing
added.

With ``compatibility="retro_pytorch"`` queries have position 2 m - 2 if w = 0, else 0: that package
shifts its table of angles twice.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from memlm.models.retro.cache import Memory, RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.encoder import Encoded
from memlm.models.retro.grid import ChunkGrid
from memlm.models.retro.layers import (
    FeedForward,
    Residual,
    RetroAttention,
    Rotation,
    make_norm,
    rotate,
    rotation,
)
from memlm.models.retro.reading import Reading
from memlm.ops.chunked_cross_attention import chunked_cross_attention


class Sight(NamedTuple):
    """What self-attention of one forward pass may see.

    Attributes:
        turn: rotation of the new tokens' positions.
        mask: to add; None: see ``causal``.
        causal: every token sees itself and those before it.
        cache: keys and values of the past.
    """

    turn: Rotation
    mask: Tensor | None
    causal: bool
    cache: Cache | None


class CausalAttention(RetroAttention):
    """Self-attention of the decoder."""

    def __init__(self, config: RetroConfig, index: int):
        super().__init__(*_decoder_attention(config))
        self.config = config
        self.layer_idx = index

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """``(batch, time, width)`` to the same."""
        query = self.queries(x, sight.turn)
        key, value = self.keys_values(x, sight.turn)
        if sight.cache is not None:
            key, value = sight.cache.update(key, value, self.layer_idx)
        return self.attend(query, key, value, sight.mask, causal=sight.causal)


class CrossAttention(RetroAttention):
    """Chunked cross-attention to encoded neighbours."""

    def __init__(self, config: RetroConfig, index: int):
        super().__init__(*_decoder_attention(config))
        self.config = config
        self.index = index
        inner = config.num_attention_heads * config.head_dim
        self.null_key = nn.Parameter(torch.empty(inner))
        self.null_value = nn.Parameter(torch.empty(inner))

    def forward(
        self, x: Tensor, grid: ChunkGrid, encoded: Encoded | None, cache: RetroCache | None
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(batch, time, width)``.
            grid: of these columns.
            encoded: neighbours of the chunks that end in them; None: there are none.
            cache: neighbours of the chunks before, and where the latest are put.

        Returns:
            ``(batch, time, width)``; zeros for tokens that attend to no chunk.
        """
        batch, time, width = x.shape
        tokens, chunk, slot = grid.tokens, grid.chunk, grid.slot
        memory = None if encoded is None else self.remember(encoded)
        before = None if cache is None else cache.neighbours.get(self.index)
        if cache is not None and before is not None:
            row = tokens // time
            if memory is None:
                chunk, memory = row, before
            else:
                chunk, memory = torch.where(chunk < 0, row, chunk + batch), before + memory
            has = cast(Tensor, cache.current)[row] | (grid.chunk >= 0)
        else:
            has = chunk >= 0
        if memory is None:
            return torch.zeros_like(x)
        if not bool(has.all()):
            tokens, chunk, slot = tokens[has], chunk[has], slot[has]
        turn = rotation(self._positions(slot), self.config, x.dtype)
        query = self.query(x.flatten(0, 1)[tokens]).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        step = 1 if time == 1 else self.config.chunk_size
        mixed = chunked_cross_attention(
            rotate(query, turn).transpose(0, 1),
            memory.key,
            memory.value,
            memory.visible,
            chunk * step + (slot if time > 1 else 0),
            step,
            dropout=self.dropout_now,
        )
        if cache is not None and encoded is not None:
            cache.neighbours[self.index] = memory.rows(_latest(grid, before is not None))
        output = self.output(mixed.flatten(1))
        rows = output.new_zeros(batch * time, width)
        return rows.index_copy(0, tokens, output).view_as(x)

    def remember(self, encoded: Encoded) -> Memory:
        """Keys and values of encoded neighbours, projected once each, behind the null ones."""
        chunks, _, length = encoded.visible.shape
        turn = rotation(
            torch.arange(length, device=encoded.states.device), self.config, encoded.states.dtype
        )
        key, value = (
            torch.cat([self.split(null[None]).expand(chunks, -1, -1, -1), beside], dim=2)
            for null, beside in zip(
                (self.null_key, self.null_value),
                (
                    part[encoded.pick].transpose(1, 2).flatten(2, 3)
                    for part in self.keys_values(encoded.states, turn)
                ),
                strict=True,
            )
        )
        seen = encoded.visible.flatten(1)
        return Memory(key, value, torch.cat([seen.new_ones(chunks, 1), seen], dim=1))

    def _positions(self, slot: Tensor) -> Tensor:
        size = self.config.chunk_size
        if self.config.compatibility == "retro_pytorch":
            return torch.where(slot == 0, 2 * size - 2, 0)
        return slot + size - 1


class DecoderLayer(nn.Module):
    """The sub-layers of one layer; ``cross`` only in layers that attend to neighbours."""

    def __init__(self, config: RetroConfig, index: int):
        super().__init__()
        width, scale = config.hidden_size, config.residual_scales[1]

        def residual(inner: nn.Module) -> Residual:
            norm = make_norm(config, width)
            return Residual(inner, norm, norm_first=config.norm_first, scale=scale)

        self.attention = residual(CausalAttention(config, index))
        self.cross: Residual | None = None
        if index + 1 in (config.cross_attention_layers or ()):
            self.cross = residual(CrossAttention(config, index))
        inner = config.intermediate_size or 4 * width
        self.feed = residual(FeedForward(width, inner, config.activation_dropout, config.gains[1]))

    def forward(self, x: Tensor, sight: Sight, reading: Reading) -> Tensor:
        """``(batch, time, width)`` to the same."""
        x = self.attention(x, sight)
        if self.cross is not None:
            x = reading.attend(self.cross, x)
        return self.feed(x)


def _decoder_attention(config: RetroConfig) -> tuple[int, int, int, int, float, float]:
    """What `RetroAttention` takes for either attention of the decoder."""
    width = config.hidden_size
    heads = config.num_attention_heads, config.head_dim
    return (width, width, *heads, config.attention_dropout, config.gains[1])


def _latest(grid: ChunkGrid, behind_past: bool) -> Tensor:
    """Per row, its last chunk among (rows of the past, if any, and) the chunks of the grid."""
    batch = len(grid.per_row)
    last = grid.per_row.cumsum(0) - 1
    rows = torch.arange(batch, device=last.device)
    if behind_past:
        return torch.where(grid.per_row > 0, last + batch, rows)
    return last.clamp(min=0)
