"""Where chunks end, and which tokens attend to which chunk.

A token at position p of its document stands at place g = p + offset of a grid. Chunk j ends at

    g = m - 1 + j s            m the chunk size, s the retrieval step (m unless given)

consists of the m places up to its end, and is attended to by the s tokens from its end on. With s
= m chunks are the paper's: side by side. A smaller step retrieves anew every s tokens, always for
the latest m tokens (Wang et al. 2023). The offset (0 to m - 1) moves the grid: text aligned left
has offset 0, text aligned right the one that lets a chunk end with its last token, so that also a
prompt shorter than a chunk retrieves; the first chunk is then short.

Every document of a packed row and every padded row has a grid of its own. Chunks of a row are
numbered in order of their ends; `Neighbours` come in that order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check


class ChunkGrid(NamedTuple):
    """The grid over some columns, chunks counted through all rows.

    Attributes:
        positions: ``(batch, time)`` position of each token in its document.
        documents: ``(batch, time)`` number of each token's document in its row, or None for one.
        rows: ``(chunks,)`` row of each chunk that ends in these columns.
        numbers: ``(chunks,)`` which chunk of its row it is.
        ends: ``(chunks,)`` column of its last token.
        own: ``(chunks, m)`` bool: which of the m columns up to the end belong to it.
        per_row: ``(batch,)`` how many chunks end in each row.
        tokens: ``(queries,)`` flat index of the tokens that attend to a chunk.
        chunk: ``(queries,)`` to which; -1 for the last one that ended before these columns.
        slot: ``(queries,)`` tokens since that chunk's end.
    """

    positions: Tensor
    documents: Tensor | None
    rows: Tensor
    numbers: Tensor
    ends: Tensor
    own: Tensor
    per_row: Tensor
    tokens: Tensor
    chunk: Tensor
    slot: Tensor

    def columns(self) -> Tensor:
        """``(chunks, m)`` columns of the chunks' tokens; may be negative: before these columns."""
        size = self.own.shape[1]
        return self.ends[:, None] + torch.arange(1 - size, 1, device=self.ends.device)


def chunk_grid(
    batch: int,
    time: int,
    chunk_size: int,
    *,
    step: int | None = None,
    real: Tensor | None = None,
    document_ids: Tensor | None = None,
    offset: Tensor | None = None,
    past: int = 0,
    device: torch.device | None = None,
) -> ChunkGrid:
    """The grid over ``time`` new columns behind ``past`` ones.

    Args:
        batch: rows.
        time: new columns.
        chunk_size: m.
        step: s, from 1 to m; None: m.
        real: ``(batch, past + time)`` bool, False for padding, which may stand at either end of a
            row; None: all real.
        document_ids: ``(batch, time)``; a new document begins where the number changes.
        offset: ``(batch,)`` int64 from 0 to m - 1; None: 0.
        past: columns before.
        device: of the result.

    Raises:
        InputError: for a step or offset out of range, a mask of another shape or with gaps, or
            documents behind a past.
    """
    step = chunk_size if step is None else step
    check(1 <= step <= chunk_size, f"retrieval_step must be from 1 to {chunk_size}, got {step}")
    columns = torch.arange(time, device=device).expand(batch, time)
    documents = None
    if real is None:
        positions, now = columns + past, torch.ones_like(columns, dtype=torch.bool)
    else:
        check(
            tuple(real.shape) == (batch, past + time),
            f"attention_mask must be (batch, all tokens, those in the cache too) = "
            f"{(batch, past + time)}, got {tuple(real.shape)}",
        )
        runs = real[:, :1].int().sum() + (real[:, 1:] & ~real[:, :-1]).sum()
        check(
            int(runs) == int(real.any(1).sum()),
            "the real tokens of a row must stand together, but attention_mask has gaps; pad at "
            "the ends",
        )
        positions, now = (real.cumsum(1) - 1).clamp(min=0)[:, past:], real[:, past:]
    if document_ids is not None:
        check(
            past == 0, "document_ids must come without a cache, got past keys; read documents apart"
        )
        check(
            tuple(document_ids.shape) == (batch, time),
            f"document_ids must be (batch, time) = {(batch, time)}, got "
            f"{tuple(document_ids.shape)}",
        )
        first = torch.ones_like(document_ids, dtype=torch.bool)
        first[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]) | (now[:, 1:] & ~now[:, :-1])
        documents = first.cumsum(1)
        positions = columns - torch.where(first, columns, 0).cummax(1).values
    place = positions
    if offset is not None:
        low, high = (int(offset.min()), int(offset.max())) if len(offset) else (0, 0)
        check(
            len(offset) == batch and low >= 0 and high < chunk_size,
            f"chunk_offset must be {batch} numbers from 0 to {chunk_size - 1}, got "
            f"{offset.tolist()}",
        )
        place = positions + offset[:, None]
    since = place - (chunk_size - 1)
    reached = now & (since >= 0)
    is_end = reached & (since % step == 0)
    count = is_end.cumsum(1)
    per_row = count[:, -1] if time else count.new_zeros(batch)
    before = per_row.cumsum(0) - per_row
    rows, ends = is_end.nonzero(as_tuple=True)
    row_of, column_of = reached.nonzero(as_tuple=True)
    number = count[row_of, column_of] - 1
    return ChunkGrid(
        positions=positions,
        documents=documents,
        rows=rows,
        numbers=count[rows, ends] - 1,
        ends=ends,
        own=positions[rows, ends][:, None]
        >= torch.arange(chunk_size - 1, -1, -1, device=positions.device),
        per_row=per_row,
        tokens=row_of * time + column_of,
        chunk=torch.where(number < 0, -1, before[row_of] + number),
        slot=since[row_of, column_of] % step,
    )


def right_offset(lengths: Tensor, chunk_size: int, step: int | None = None) -> Tensor:
    """The offset that lets a chunk end with the last of ``lengths`` ``(batch,)`` tokens."""
    step = chunk_size if step is None else step
    short = chunk_size - lengths
    return torch.where(short > 0, short, short % step)
