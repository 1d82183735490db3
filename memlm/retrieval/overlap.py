"""How much of a chunk can be copied from its neighbours (Borgeaud et al. 2022, 2.8).

    r(C) = s / |C|      s: the longest run of tokens that chunk C shares with a neighbour [N, F]

r depends on the database and the retriever alone, not on any model.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.neighbours import NeighbourTable


class CommonRun(NamedTuple):
    """The longest run of tokens that two sequences share; the first one, if several.

    Attributes:
        length: in tokens.
        first: where it begins in the one sequence.
        other: where it begins in the other.
    """

    length: int
    first: int
    other: int


def longest_common_run(one: NDArray[np.integer], other: NDArray[np.integer]) -> CommonRun:
    """The longest contiguous common part of two rows of tokens."""
    best = CommonRun(0, 0, 0)
    lengths = np.zeros(len(other) + 1, np.int64)  # of the run that ends before each place
    for place, token in enumerate(one):
        lengths[1:] = np.where(other == token, lengths[:-1] + 1, 0)
        longest = int(lengths.argmax())
        if lengths[longest] > best.length:
            length = int(lengths[longest])
            best = CommonRun(length, place + 1 - length, longest - length)
    return best


def chunk_overlaps(
    text: ChunkDatabase,
    neighbours: NeighbourTable,
    database: ChunkDatabase,
    chunks: NDArray[np.integer],
    *,
    k: int | None = None,
) -> NDArray[np.float64]:
    """r(C) of some chunks.

    Args:
        text: whose chunks.
        neighbours: of the text; the paper looks at 10 of each chunk.
        database: where they are from.
        chunks: ``(n,)`` numbers.
        k: neighbours looked at; None: all of the table.

    Returns:
        ``(n,)`` shares from 0 to 1; 0 without neighbours.
    """
    shares = np.zeros(len(chunks))
    for row, chunk in enumerate(chunks):
        own = text.chunk(int(chunk))
        found = database.gather(neighbours.lookup(chunk, k))
        # one row with -1 between the neighbours, which no token equals
        joined = np.where(found.valid, found.tokens, -1)
        joined = np.pad(joined, ((0, 0), (0, 1)), constant_values=-1).reshape(-1)
        shares[row] = longest_common_run(own, joined).length / len(own)
    return shares
