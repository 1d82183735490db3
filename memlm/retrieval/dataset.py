"""What RETRO trains on: sequences of tokens, and for each of their chunks the neighbours' tokens.

A sequence holds pieces of documents one behind the other. A piece is a run of whole chunks of a
document (or its end), so that its chunks are chunks of the database with neighbours of their own;
it has one token more if the document goes on, so that with labels shifted in the model every token
but a document's first is predicted exactly once::

    packed            pieces fill a sequence as long as another chunk fits; ``document_ids`` keeps
                      them apart (attention and chunks do not reach over)
    one by one        one piece in a sequence, the rest is padding

Differs from the paper's code: there, one document per sequence; the rest of it is padding that the
encoder reads too (`memlm.retrieval.original` has that data).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.data.batches import IGNORED
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.neighbours import NeighbourTable


class RetroDataset(Dataset):
    """Sequences of a text with their neighbours; ``torch.utils.data.DataLoader`` batches them.

    Every item is a dictionary of tensors, with n = ``chunks_per_sequence`` x chunk size + 1:

    ``input_ids``        ``(n,)`` int64
    ``labels``           ``(n,)`` int64, the same ids, -100 where nothing is predicted: the first
                         token of a piece, padding
    ``attention_mask``   ``(n,)`` int64, 0 for padding, which is at the end
    ``document_ids``     ``(n,)`` int64, the piece of each token from 0 on; -1 for padding
    ``neighbours``       ``(chunks, k, 2 x chunk size)`` int64, neighbour and continuation of every
                         whole chunk of the sequence in order
    ``neighbour_mask``   bool of the same shape, False where there is no token or no chunk

    Args:
        text: what is trained on.
        neighbours: table of the text; None: items have no neighbours.
        database: where the neighbours are from; None: the text itself.
        chunks_per_sequence: S; the paper's sequences of 2048 tokens have 32 of 64.
        k: neighbours per chunk; None: as many as the table has.
        packed: several pieces in a sequence.
        pad_id: token where there is none.

    Raises:
        InputError: if a number is out of range or there is no text.
        FingerprintError: if the table is of another text or database.
    """

    def __init__(
        self,
        text: ChunkDatabase,
        neighbours: NeighbourTable | None = None,
        database: ChunkDatabase | None = None,
        *,
        chunks_per_sequence: int = 32,
        k: int | None = None,
        packed: bool = True,
        pad_id: int = 0,
    ):
        check(
            chunks_per_sequence >= 1,
            f"chunks_per_sequence must be at least 1, got {chunks_per_sequence}",
        )
        self.text, self.neighbours = text, neighbours
        self.database = text if database is None else database
        self.pad_id = pad_id
        if neighbours is not None:
            check(
                k is None or 1 <= k <= neighbours.k,
                f"k must lie between 1 and the table's {neighbours.k}, got {k}",
            )
            expected = (text.fingerprint, self.database.fingerprint)
            there = (neighbours.record["text"], neighbours.record["database"])
            if expected != there:
                raise FingerprintError(
                    f"the neighbours in {neighbours.path} must be of text {expected[0]} in "
                    f"database {expected[1]}, but are of {there[0]} in {there[1]}; make the table "
                    "again"
                )
        self.k = k
        self.length = chunks_per_sequence * text.chunk_size + 1
        """Tokens of an item."""
        self._pieces, self._starts = _pack(text, self.length, packed)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):  # what ends a loop over a data set
            raise IndexError(f"a sequence's number must be below {len(self)}, got {number}")
        ids = np.full(self.length, self.pad_id, np.int64)
        places = np.full(self.length, -1, np.int64)
        labels = np.full(self.length, IGNORED, np.int64)
        for place, (start, first, length) in enumerate(self._layout(number)):
            end = start + length
            ids[start:end] = self.text.gather(np.array([first]), length).tokens[0]
            labels[start + 1 : end] = ids[start + 1 : end]
            places[start:end] = place
        item: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (places >= 0).astype(np.int64),
            "document_ids": places,
        }
        if self.neighbours is not None:
            found = self.database.gather(self.neighbours.lookup(self.whole_chunks(number), self.k))
            item["neighbours"] = np.where(found.valid, found.tokens, self.pad_id)
            item["neighbour_mask"] = found.valid
        return {name: torch.from_numpy(value) for name, value in item.items()}

    def whole_chunks(self, number: int) -> NDArray[np.int64]:
        """The chunks of a sequence that have neighbours, ``(chunks,)``; -1 beyond the last."""
        size = self.text.chunk_size
        runs = [
            np.arange(first, first + length // size) for _, first, length in self._layout(number)
        ]
        chunks = np.full(self.length // size, -1, np.int64)
        found = np.concatenate(runs)
        chunks[: len(found)] = found
        return chunks

    def chunk_of_tokens(self, number: int) -> NDArray[np.int64]:
        """The chunk of each token of a sequence, ``(n,)``; -1 for padding."""
        chunks = np.full(self.length, -1, np.int64)
        for start, first, length in self._layout(number):
            chunks[start : start + length] = first + np.arange(length) // self.text.chunk_size
        return chunks

    def _layout(self, number: int) -> list[tuple[int, int, int]]:
        """Where each piece of a sequence begins, its first chunk, and its length in tokens."""
        pieces = self._pieces[self._starts[number] : self._starts[number + 1]]
        begins = np.cumsum(pieces[:, 1]) - pieces[:, 1]
        return [(int(b), int(f), int(n)) for b, (f, n) in zip(begins, pieces, strict=True)]


def _pack(
    text: ChunkDatabase, length: int, packed: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pieces ``(pieces, 2)`` of first chunk and tokens, and where each sequence's begin."""
    size = text.chunk_size
    pieces: list[tuple[int, int]] = []
    starts = [0]
    room = length

    def close() -> None:
        nonlocal room
        if len(pieces) > starts[-1]:
            starts.append(len(pieces))
        room = length

    for number in np.flatnonzero(~text.deleted):
        tokens = int(text.offsets[number + 1] - text.offsets[number])
        read = 0
        while tokens - read > 1:  # a single token predicts nothing
            if tokens - read > room and room <= size:
                close()
            left = tokens - read
            count = left if left <= room else (room - 1) // size * size + 1
            pieces.append((int(text.chunk_offsets[number]) + read // size, count))
            room -= count
            read += count if count == left else count - 1
            if not packed or room <= 1:
                close()
    close()
    check(bool(pieces), f"{text.path} must hold text to train on, but no document has two tokens")
    return np.array(pieces, np.int64), np.array(starts, np.int64)
