"""What generation asks of a retriever: the neighbours of a few chunks of tokens.

The model knows nothing of databases. Whatever has this one method can stand behind
``RetroForCausalLM.generate(retriever=...)``.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class ChunkRetriever(Protocol):
    """Finds neighbours for chunks of text that are being read or written."""

    def retrieve(self, chunks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The k neighbours of each chunk.

        Args:
            chunks: n tensors ``(length,)`` int64 on any device: the tokens of one chunk each, at
                most the chunk size and at least one (the first chunk of a text that is aligned
                right may be short). A tensor ``(n, chunk_size)`` is such a sequence.

        Returns:
            ``(n, k, length)`` int64 tokens, neighbour and continuation, of at least one chunk's
            length, and a bool mask of that shape, False where there is no token: past the end of a
            document, or for a neighbour that was not found. Both on any device.
        """
        ...
