"""Looking up chunks while text is generated: what a RETRO model's ``generate`` asks.

It has the one method of `memlm.models.retro.retriever.ChunkRetriever`. A chunk is looked up in the
same form as those of the database were (the paper's code adds an end token here, and not there).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.retrieval.retrievers import Retriever


class ChunkLookup:
    """The k best neighbours of any chunk, with their continuations.

    Args:
        retriever: of a database.
        k: neighbours of each chunk.

    Raises:
        InputError: if k is below 1.
    """

    def __init__(self, retriever: Retriever, k: int = 2):
        check(k >= 1, f"k must be at least 1, got {k}")
        self.retriever, self.k = retriever, k

    def retrieve(self, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Neighbours of chunks of tokens.

        Args:
            chunks: n rows of at least one token each.

        Returns:
            ``(n, k, 2 x chunk size)`` int64 tokens and a bool mask, False where there is none.
        """
        rows = [torch.as_tensor(chunk).cpu().numpy() for chunk in chunks]
        database = self.retriever.database
        ids = self.retriever.search(rows, self.k).ids.cpu().numpy()
        found = database.gather(ids)
        return torch.from_numpy(found.tokens), torch.from_numpy(found.valid)
