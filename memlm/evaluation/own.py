"""A text that is in the store itself: what a query must not see, so as not to find itself.

Scored on the text that a datastore was made of, a memory finds the very token it is asked for, and
its perplexity says nothing. The guard leaves out, for each scored token,

    "position"   its own entry
    "document"   all entries of its own document
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.types import TokenMemory
from memlm.data.tokens import TokenCorpus

LEAVE_OUT = ("nothing", "position", "document")


class OwnEntries:
    """Which entries of a store are a scored token's own.

    Args:
        memory: without state, of a store that knows documents (a `KnnMemory`).
        corpus: the text the store was made of.
        what: "position" or "document".

    Raises:
        InputError: if the memory cannot leave out anything, or the store is not of this text.
    """

    def __init__(self, memory: TokenMemory | None, corpus: TokenCorpus, what: str):
        store: Any = getattr(memory, "store", None)
        if store is None or not hasattr(memory, "leaving_out"):
            raise InputError(
                "only a kNN memory can leave out entries for each token, got "
                f"{type(memory).__name__}; evaluate with one, or leave out nothing"
            )
        identity, documents = store.manifest.identity, store.documents
        if identity.corpus_hash != corpus.hash or documents is None:
            raise InputError(
                f"to leave out a token's own {what} the store must be made of the very text that "
                f"is scored, got a store of text {identity.corpus_hash} and text {corpus.hash}; "
                "score that text, or leave out nothing"
            )
        self.memory: Any = memory
        self._corpus, self._what = corpus, what
        self._places = documents.long().numpy()
        if what == "position":
            self._places = corpus.offsets[self._places] + store.positions.numpy()
        check(
            bool((np.diff(self._places) >= 0).all()),
            "the entries of the store must stand in the order of the text, but they do not; "
            "build it from the text again",
        )

    def without(self, places: NDArray[np.int64]) -> TokenMemory:
        """The memory for one read: the tokens at ``places`` ``(queries,)`` do not see their own."""
        own = self._corpus.document_of(places) if self._what == "document" else places
        ends: list[Tensor] = [
            torch.from_numpy(np.searchsorted(self._places, own, side)) for side in ("left", "right")
        ]
        return self.memory.leaving_out(*ends)
