"""RETRO's encoder: neighbours read in both directions, with a look at the chunk they are for.

    layer:  x = x + self-attention(norm x)
            x = x + attention(norm x, H_u)     in the layers that look at H_u, the decoder's states
            x = x + feed-forward(norm x)       of chunk u; at the end norm and projection

(Borgeaud et al. 2022, section 2.4 and algorithm 1.) A neighbour's tokens have positions 0, 1,
...; those of the chunk 0 to m - 1.

Nothing is computed twice or in vain: neighbours without tokens are not read, columns that are
padding everywhere are cut, equal neighbours are read once up to the first layer that looks at the
chunk, and from there on once per chunk; the chunk's keys and values are projected once, not once
per neighbour. All of it is exact. (With dropout, equal neighbours share their noise.)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlm.models.retro.config import RetroConfig
from memlm.models.retro.layers import (
    BodyLinear,
    FeedForward,
    Residual,
    RetroAttention,
    Rotation,
    additive,
    make_norm,
    rotation,
)


class Encoded(NamedTuple):
    """Encoded neighbours of some chunks.

    Attributes:
        states: ``(distinct, length, hidden_size)``.
        pick: ``(chunks, k)`` which of them each neighbour is; 0 for one without tokens.
        visible: ``(chunks, k, length)`` bool.
    """

    states: Tensor
    pick: Tensor
    visible: Tensor


class _Distinct(NamedTuple):
    """The different neighbours of some chunks.

    Attributes:
        tokens: ``(texts, length)`` distinct neighbours.
        visible: alike, bool.
        text: ``(pairs,)`` which text each distinct (chunk, neighbour) pair has.
        chunk: ``(pairs,)`` which chunk.
        pick: ``(chunks, k)`` which pair each neighbour is.
    """

    tokens: Tensor
    visible: Tensor
    text: Tensor
    chunk: Tensor
    pick: Tensor


class SelfAttention(RetroAttention):
    """Attention of a neighbour to itself, in both directions."""

    def forward(self, x: Tensor, turn: Rotation, mask: Tensor | None) -> Tensor:
        """``(neighbours, length, width)`` to the same."""
        return self.attend(self.queries(x, turn), *self.keys_values(x, turn), mask)


class ChunkAttention(RetroAttention):
    """Attention of a neighbour to the decoder's states of its chunk."""

    def forward(
        self,
        x: Tensor,
        turn: Rotation,
        chunks: Tensor,
        chunk_turn: Rotation,
        chunk_mask: Tensor | None,
        chunk: Tensor,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``(pairs, length, width)``.
            turn: rotation of a neighbour's positions.
            chunks: ``(chunks, m, hidden_size)``.
            chunk_turn: rotation of a chunk's positions.
            chunk_mask: to add, ``(chunks, 1, 1, m)``.
            chunk: ``(pairs,)`` which chunk each neighbour is for.
        """
        key, value = (part[chunk] for part in self.keys_values(chunks, chunk_turn))
        mask = None if chunk_mask is None else chunk_mask[chunk]
        return self.attend(self.queries(x, turn), key, value, mask)


class EncoderLayer(nn.Module):
    """Self-attention, attention to the chunk in some layers, feed-forward."""

    def __init__(self, config: RetroConfig, number: int):
        super().__init__()
        width = config.encoder_hidden_size
        gain, scale = config.gains[0], config.residual_scales[0]
        heads = config.num_attention_heads, config.head_dim, config.encoder_attention_dropout

        def residual(inner: nn.Module) -> Residual:
            norm = make_norm(config, width)
            return Residual(inner, norm, norm_first=config.norm_first, scale=scale)

        self.attention = residual(SelfAttention(width, width, *heads, gain))
        self.cross: Residual | None = None
        if number in config.encoder_cross_attention_layers:
            self.cross = residual(ChunkAttention(width, config.hidden_size, *heads, gain))
        inner = config.encoder_intermediate_size or 4 * width
        self.feed = residual(FeedForward(width, inner, config.encoder_activation_dropout, gain))


class RetroEncoder(nn.Module):
    """Neighbours and the states of their chunks to what cross-attention reads."""

    def __init__(self, config: RetroConfig):
        super().__init__()
        width = config.encoder_hidden_size
        self.config = config
        self.layers = nn.ModuleList(
            EncoderLayer(config, number + 1) for number in range(config.encoder_num_layers)
        )
        self.norm = make_norm(config, width) if config.norm_first else nn.Identity()
        self.output = BodyLinear(width, config.hidden_size)

    def forward(
        self,
        neighbours: Tensor,
        visible: Tensor,
        embedding: Callable[[Tensor], Tensor],
        chunks: Tensor,
        own: Tensor | None,
    ) -> Encoded:
        """Encode.

        Args:
            neighbours: ``(chunks, k, length)`` tokens.
            visible: alike, bool.
            embedding: of the neighbours' tokens.
            chunks: ``(chunks, m, hidden_size)`` states of the decoder.
            own: ``(chunks, m)`` bool, which of them are tokens of the chunk; None: all.
        """
        used = visible.flatten(0, 1).any(0).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        neighbours, visible = neighbours[..., :length], visible[..., :length]
        found = distinct_neighbours(
            neighbours, visible, conditioned=bool(self.config.encoder_cross_attention_layers)
        )
        x = self.encode(
            embedding(found.tokens), found.visible, chunks, own, text=found.text, chunk=found.chunk
        )
        return Encoded(x, found.pick, visible)

    def encode(
        self,
        x: Tensor,
        visible: Tensor,
        chunks: Tensor,
        own: Tensor | None,
        *,
        text: Tensor,
        chunk: Tensor,
    ) -> Tensor:
        """Encode embedded texts for pairs of a text and a chunk.

        Args:
            x: ``(texts, length, encoder_hidden_size)``.
            visible: ``(texts, length)`` bool.
            chunks: ``(chunks, m, hidden_size)``.
            own: ``(chunks, m)`` bool or None.
            text: ``(pairs,)`` which text.
            chunk: ``(pairs,)`` which chunk.

        Returns:
            ``(pairs, length, hidden_size)``.
        """
        turns = [
            rotation(torch.arange(size, device=x.device), self.config, x.dtype)
            for size in (x.shape[1], chunks.shape[1])
        ]
        mask = None if bool(visible.all()) else additive(visible, x.dtype)[:, None, None]
        every = own is None or bool(own.all())
        chunk_mask = None if every or own is None else additive(own, x.dtype)[:, None, None]
        apart = False
        stack: list[EncoderLayer] = list(self.layers)  # type: ignore[assignment]
        for layer in stack:
            x = layer.attention(x, turns[0], mask)
            if layer.cross is not None:
                if not apart:
                    x, mask, apart = x[text], None if mask is None else mask[text], True
                x = layer.cross(x, turns[0], chunks, turns[1], chunk_mask, chunk)
            x = layer.feed(x)
        return self.output(self.norm(x if apart else x[text]))


def distinct_neighbours(neighbours: Tensor, visible: Tensor, *, conditioned: bool) -> _Distinct:
    """Sort neighbours ``(chunks, k, length)`` into distinct texts and distinct pairs with chunks.

    Args:
        neighbours: tokens.
        visible: which of them are there.
        conditioned: encodings depend on the chunk, so only equal neighbours of one chunk are equal.
    """
    size, k, length = neighbours.shape
    rows = neighbours.masked_fill(~visible, -1).flatten(0, 1)
    some = visible.any(-1).flatten()
    texts, which = rows[some].unique(dim=0, return_inverse=True)
    if len(texts) == 0:  # one text of nothing, which nobody sees
        texts, visible_texts = rows.new_zeros(1, length), visible.new_zeros(1, length)
        zero = which.new_zeros(1)
        return _Distinct(texts, visible_texts, zero, zero, rows.new_zeros(size, k))
    owner = torch.arange(size, device=rows.device).repeat_interleave(k)[some]
    key = owner * len(texts) + which if conditioned else which
    pairs, pair = key.unique(return_inverse=True)
    pick = rows.new_zeros(size * k)
    pick[some] = pair
    chunk = pairs // len(texts) if conditioned else torch.zeros_like(pairs)
    return _Distinct(
        tokens=texts.clamp(min=0),
        visible=texts >= 0,
        text=pairs % len(texts),
        chunk=chunk,
        pick=pick.view(size, k),
    )
