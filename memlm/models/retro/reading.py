"""One forward pass that reads neighbours: checked, encoded once, attended to layer by layer.

    before the first cross-attention, once:
        neighbours = encoder(neighbours, states of their chunks)   (Borgeaud et al. 2022, alg. 1)
    in every layer that attends to them:
        x = cross-attention(x, neighbours)

What later steps of decoding need of it (`memlm.models.retro.cache`) is put on the cache on the way.
The decoder may be RETRO's own or any other one (`memlm.models.retro.fit`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.encoder import Encoded, RetroEncoder
from memlm.models.retro.grid import ChunkGrid
from memlm.models.retro.layers import Residual


class Reading:
    """The neighbours of one forward pass.

    Args:
        config: chunk size and compatibility.
        encoder: of neighbours.
        embed: tokens of neighbours to what the encoder reads.
        grid: over the new columns.
        found: tokens ``(chunks, k, length)`` of the neighbours of the grid's chunks and their mask;
            None: there are none.
        cache: of the past; None: these columns are all.
        asked: whether neighbours were given at all. In training, then, every weight gets a
            gradient even if no chunk ends in the batch, as processes that exchange them expect.
    """

    def __init__(
        self,
        config: RetroConfig,
        encoder: RetroEncoder,
        embed: Callable[[Tensor], Tensor],
        grid: ChunkGrid,
        found: tuple[Tensor, Tensor] | None,
        cache: RetroCache | None,
        *,
        asked: bool = False,
    ):
        self.config, self.encoder, self.embed = config, encoder, embed
        self.grid, self.found, self.cache, self.asked = grid, found, cache, asked
        self.encoded: Encoded | None = None
        self.begun = False

    def attend(self, cross: Residual, x: Tensor) -> Tensor:
        """One layer's cross-attention: ``(batch, time, width)`` to the same."""
        if not self.begun:
            self.encoded, self.begun = self._encode(x), True
        if self.encoded is not None or (self.cache is not None and self.cache.neighbours):
            return cross(x, self.grid, self.encoded, self.cache)
        return cross.passed(x) if self.config.compatibility == "none" else x

    def finish(self) -> None:
        """Tell the cache which rows have a current chunk, after the last layer."""
        if self.cache is not None and self.encoded is not None:
            now, before = self.grid.per_row > 0, self.cache.current
            self.cache.current = now if before is None else before | now

    def _encode(self, x: Tensor) -> Encoded | None:
        """Neighbours encoded at the sight of their chunks' states."""
        grid, cache, states = self.grid, self.cache, x
        if cache is not None:
            states = x if cache.tail is None else torch.cat([cache.tail, x], dim=1)
            # The whole chunk before the next token is m - 1 states at most.
            cache.tail = states[
                :, states.shape[1] - min(states.shape[1], self.config.chunk_size - 1) :
            ]
        if self.found is None:
            check(
                cache is None or not cache.neighbours or len(grid.rows) == 0,
                "neighbours must be given for every chunk once they were given for one, got none "
                f"for {len(grid.rows)} chunks that end here",
            )
            if self.asked and self.encoder.training and torch.is_grad_enabled():
                nothing = grid.rows.new_zeros(1, 1, 1)  # for a chunk that nobody attends to
                return self.encoder(nothing, nothing.bool(), self.embed, states[:1, :1], None)
            return None
        columns = (grid.columns() + states.shape[1] - x.shape[1]).clamp(min=0)
        flat = columns + grid.rows[:, None] * states.shape[1]
        chunks = states.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, flat.shape)
        return self.encoder(*self.found, self.embed, chunks, grid.own)


def neighbours_of(
    neighbours: Tensor,
    mask: Tensor | None,
    grid: ChunkGrid,
    config: RetroConfig,
    *,
    aligned: bool,
) -> tuple[Tensor, Tensor] | None:
    """Neighbours as a forward pass gets them to those of the grid's chunks.

    Args:
        neighbours: ``(batch, chunks, k, length)`` tokens, or without k.
        mask: alike, or None.
        grid: over the new columns.
        config: chunk size, padding and vocabulary.
        aligned: no row is padded.

    Returns:
        ``(chunks, k, length)`` tokens and a bool mask; None if there is nothing to read.

    Raises:
        InputError: if they do not fit the chunks, or hold a token outside the vocabulary.
    """
    if neighbours.dim() == 3:
        neighbours = neighbours[:, :, None]
        mask = None if mask is None else mask[:, :, None]
    batch, time = grid.positions.shape
    check(
        neighbours.dim() == 4 and len(neighbours) == batch,
        f"neighbours must be (batch = {batch}, chunks, k, length), got {tuple(neighbours.shape)}",
    )
    size = config.chunk_size
    check(
        neighbours.shape[3] >= size,
        f"neighbours must be at least chunk_size = {size} tokens long, got "
        f"{neighbours.shape[3]}; pad shorter ones and mask the padding",
    )
    needed = int(grid.per_row.max())
    most = needed if aligned and grid.documents is None else max(needed, neighbours.shape[1])
    given = neighbours.shape[1]
    check(
        needed <= given <= most,
        f"expected neighbours of {needed} chunks for {time} tokens at chunk_size {size}, got "
        f"{given}; give those of every chunk that ends here",
    )
    if len(grid.rows) == 0 or neighbours.shape[2] == 0:
        return None
    if mask is None:
        padding = config.neighbour_padding
        mask = torch.ones_like(neighbours) if padding is None else neighbours != padding
    check(
        mask.shape == neighbours.shape,
        f"neighbour_mask must have the shape of neighbours, {tuple(neighbours.shape)}, got "
        f"{tuple(mask.shape)}",
    )
    seen = mask[grid.rows, grid.numbers].bool()
    chosen = neighbours[grid.rows, grid.numbers].masked_fill(~seen, 0)
    check_tokens(chosen, config.vocab_size, "neighbours")
    return chosen, seen


def check_tokens(tokens: Tensor, vocab_size: int, what: str) -> None:
    """Refuse tokens outside the vocabulary.

    Raises:
        InputError: naming the first that is.
    """
    low, high = (int(end) for end in tokens.aminmax())
    check(
        low >= 0 and high < vocab_size,
        f"{what} must be in [0, {vocab_size}), got {low if low < 0 else high}; are they of this "
        "model's tokenizer?",
    )
