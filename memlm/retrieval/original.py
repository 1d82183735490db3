"""The data of retro-pytorch, with its peculiarities: what its checkpoints were trained on.

    chunk table     ``(chunks, m + 1)``: m tokens and the first of the next chunk; 0 is padding
    neighbours      the nearest K + 1, without the first ("itself"); those of the same document
                    become none, at distance 1000; then the k nearest of what is left
    item            S chunks from a sequence's start on, zeros after the first end token

Where it differs from `neighbours` and `dataset`, on purpose and only here:

* a fixed surplus is fetched, so rows can end in -1 although other documents have chunks left;
* the first of the found is dropped even if it is a duplicate and not the chunk itself;
* neighbours farther than 1000 (squared) come after those that were left out, and get lost;
* whether a neighbour has a continuation is seen by an end token among its m + 1;
* sequences at the end run on over rows that were never filled: zeros, with chunk 0 as neighbour;
* one document per sequence, padding for the rest.

Rows of neighbours beyond the table are zeros as well; the files on disk are not made longer by
reading them.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from memlm.core.config import check
from memlm.retrieval.chunks import ChunkDatabase

_FILTERED = 1000.0


class ChunkTable(NamedTuple):
    """Chunks as retro-pytorch stores them.

    Attributes:
        chunks: ``(chunks, m + 1)`` int32.
        sequences: ``(sequences,)`` int32 first chunk of every training sequence.
        documents: ``(chunks,)`` int32 document of every chunk.
    """

    chunks: NDArray[np.int32]
    sequences: NDArray[np.int32]
    documents: NDArray[np.int32]


def chunk_table(database: ChunkDatabase, sequence_length: int) -> ChunkTable:
    """A database in the layout of retro-pytorch.

    Args:
        database: with begin and end tokens around documents, as [CLS] and [SEP] are there.
        sequence_length: of a training sequence, in tokens.

    Raises:
        InputError: if it is no multiple of the chunk size.
    """
    size = database.chunk_size
    check(
        sequence_length % size == 0,
        f"a sequence must be a whole number of chunks of {size} tokens, got {sequence_length}",
    )
    numbers = np.arange(len(database))
    step = sequence_length // size
    starts = [
        np.arange(first, end, step)
        for first, end in zip(database.chunk_offsets[:-1], database.chunk_offsets[1:], strict=True)
    ]
    return ChunkTable(
        database.gather(numbers, size + 1).tokens.astype(np.int32),
        np.concatenate(starts).astype(np.int32),
        database.document_of(numbers).astype(np.int32),
    )


def filter_neighbours(
    ids: NDArray[np.integer],
    distances: NDArray[np.floating],
    documents: NDArray[np.integer],
    k: int,
) -> NDArray[np.int32]:
    """The k neighbours that retro-pytorch keeps of a search for every chunk.

    Args:
        ids: ``(chunks, k + surplus + 1)`` found chunks, nearest first, -1 for none.
        distances: the same shape, squared.
        documents: ``(chunks,)`` document of each.
        k: how many to keep.

    Returns:
        ``(chunks, k)`` int32, -1 for none.
    """
    found, far = ids[:, 1:].copy(), distances[:, 1:].astype(np.float32)
    own = documents[found] == documents[: len(found), None]  # -1 reads the last document: harmless
    found[own], far[own] = -1, _FILTERED
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(found, order, axis=1).astype(np.int32)


def retrieved_tokens(
    neighbours: NDArray[np.integer],
    chunks: NDArray[np.integer],
    *,
    end_id: int = 102,
    pad_id: int = 0,
    continuations: bool = True,
) -> NDArray[np.int32]:
    """Neighbours with what followed them, as retro-pytorch puts them together.

    Args:
        neighbours: chunk numbers, any shape, -1 for none.
        chunks: ``(chunks, m + 1)``.
        end_id: a chunk with this token among its m + 1 has no continuation.
        pad_id: where there is nothing.
        continuations: also the next chunk; else the chunk alone.

    Returns:
        int32, with 2 m (or m) appended to the shape.
    """
    own = chunks[np.maximum(neighbours, 0)]
    following = chunks[np.minimum(neighbours + 1, len(chunks) - 1)].copy()
    following[(own == end_id).any(-1)] = pad_id
    parts = [own[..., :-1], following[..., :-1]] if continuations else [own[..., :-1]]
    tokens = np.concatenate(parts, axis=-1)
    tokens[neighbours < 0] = pad_id
    return tokens.astype(np.int32)


class OriginalDataset(Dataset):
    """The items of retro-pytorch's ``RETRODataset``: tokens ``(n + 1,)``, retrieved ``(S, k, r)``.

    Args:
        table: the chunks; only used rows.
        neighbours: ``(chunks, k)``, -1 for none.
        sequence_length: n, a multiple of the chunk size.
        end_id: everything after the first one in a sequence becomes padding.
        pad_id: padding.
        continuations: whether r is two chunks or one.

    Raises:
        InputError: if the sizes do not fit.
    """

    def __init__(
        self,
        table: ChunkTable,
        neighbours: NDArray[np.integer],
        sequence_length: int,
        *,
        end_id: int = 102,
        pad_id: int = 0,
        continuations: bool = True,
    ):
        size = table.chunks.shape[1] - 1
        check(
            sequence_length % size == 0,
            f"a sequence must be a whole number of chunks of {size} tokens, got {sequence_length}",
        )
        check(
            len(neighbours) == len(table.chunks),
            f"there must be neighbours of every chunk, got {len(neighbours)} rows for "
            f"{len(table.chunks)} chunks",
        )
        self.table, self.neighbours = table, neighbours
        self.step = sequence_length // size
        self.end_id, self.pad_id, self.continuations = end_id, pad_id, continuations

    def __len__(self) -> int:
        return len(self.table.sequences)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        start = int(self.table.sequences[number])
        rows = _rows(self.table.chunks, start, self.step)
        tokens = np.append(rows[:, :-1].reshape(-1), rows[-1, -1]).astype(np.int64)
        ended = np.cumsum(tokens == self.end_id)
        tokens[(np.append(0, ended[:-1]) > 0)] = self.pad_id
        retrieved = retrieved_tokens(
            _rows(self.neighbours, start, self.step),
            self.table.chunks,
            end_id=self.end_id,
            pad_id=self.pad_id,
            continuations=self.continuations,
        )
        return torch.from_numpy(tokens), torch.from_numpy(retrieved.astype(np.int64))


def _rows(array: NDArray[np.integer], start: int, count: int) -> NDArray[np.integer]:
    """Rows of an array that goes on with zeros."""
    rows = np.zeros((count, array.shape[1]), array.dtype)
    there = array[start : start + count]
    rows[: len(there)] = there
    return rows
