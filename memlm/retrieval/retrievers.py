"""Finding similar chunks: by words, by embeddings, or by embeddings first and words then.

    Bm25Retriever      BM25 over the tokens of the chunks; nothing to download, embed or build
    DenseRetriever     an encoder and an index of its embeddings; the paper's (frozen BERT, L2)
    RerankedRetriever  the dense one's best, put in the order of BM25

All answer the same question, ``search(chunks, k, exclusion)``: for every chunk of tokens the k best
chunks of a database, without deleted ones and those the exclusion names (the query's own document).
Exclusion is exact: as many as are asked for come back as long as there are any, unlike in the
paper's code, which fetches a fixed surplus and returns fewer when that was not enough.

Doostmohammadi et al. (2023) find that much of RETRO's gain is overlap of words, that BM25 gives
lower perplexity than dense neighbours, and re-ranking a part of that difference.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.core.files import fingerprint
from memlm.core.types import Index, SearchResult
from memlm.data.bm25 import BlockScores
from memlm.index.exclude import Exclusion, search_without
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.embeddings import ChunkEncoder, Embeddings

Chunks = Sequence[NDArray[np.integer]]
Numbers = NDArray[np.int64]
_READ = 65_536  # chunks at a time, when all are read


class Retriever(Protocol):
    """Similar chunks of one database.

    Attributes:
        database: whose chunks are found.
        fingerprint: of everything its answers depend on.
    """

    database: ChunkDatabase
    fingerprint: str

    def search(
        self,
        chunks: Chunks,
        k: int,
        exclusion: Exclusion | None = None,
        *,
        numbers: Numbers | None = None,
    ) -> SearchResult:
        """The k best chunks for each of some chunks of tokens.

        Args:
            chunks: tokens of the database's tokenizer.
            k: neighbours of each.
            exclusion: what to leave out beside deleted documents.
            numbers: of the chunks, if they are the database's own: what is known of them already is
                not made again.

        Returns:
            ``(chunks, k)`` scores, higher is better, and int64 chunk numbers; (-inf, -1) where
            there are fewer.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Kind and settings as plain JSON values, to print with results."""
        ...


class Bm25Retriever:
    """BM25 over token numbers (Robertson et al. 1995), in memory.

    Args:
        database: whose chunks are found.
        query_terms: the rarest tokens of a query that are looked up.
        k1: saturation of repeated tokens.
        b: normalisation by length.

    Raises:
        MissingExtraError: without bm25s.
    """

    def __init__(
        self,
        database: ChunkDatabase,
        *,
        query_terms: int = 32,
        k1: float = 0.9,
        b: float = 0.4,
    ):
        check(query_terms >= 1, f"query_terms must be at least 1, got {query_terms}")
        self.database = database
        self._settings = {"query_terms": query_terms, "k1": k1, "b": b}
        blocks: list[NDArray[np.integer]] = []
        for start in range(0, len(database), _READ):
            numbers = np.arange(start, min(start + _READ, len(database)))
            blocks += database.chunks(numbers)
        self._scores = BlockScores(blocks, k1=k1, b=b)
        self._query_terms = query_terms
        self.fingerprint = fingerprint([self.describe(), database.fingerprint])

    def search(
        self,
        chunks: Chunks,
        k: int,
        exclusion: Exclusion | None = None,
        *,
        numbers: Numbers | None = None,
    ) -> SearchResult:
        """See `Retriever.search`; a chunk that shares no token is never found."""
        left_out = _with_deleted(self.database, exclusion)
        dead = without = None
        if left_out is not None:
            dead = None if left_out.dead is None else left_out.dead.numpy()
            if left_out.first is not None and left_out.end is not None:
                ranges = zip(left_out.first.tolist(), left_out.end.tolist(), strict=True)
                without = [slice(first, end) for first, end in ranges]
        search = self._scores.search(
            [np.asarray(chunk) for chunk in chunks],
            k,
            query_terms=self._query_terms,
            without=without,
            dead=dead,
        )
        scores, ids = [torch.empty(0, k)], [torch.empty(0, k, dtype=torch.int64)]
        for found in search:
            scores.append(torch.from_numpy(found.scores).float())
            ids.append(torch.from_numpy(found.numbers))
        return SearchResult(torch.cat(scores), torch.cat(ids))

    def scores(self, chunks: Chunks, ids: torch.Tensor) -> torch.Tensor:
        """Scores of some chunks of the database, ``(chunks, any)`` by number, for each query."""
        return torch.stack(
            [
                torch.from_numpy(
                    self._scores.of(
                        np.asarray(chunk), numbers.numpy(), query_terms=self._query_terms
                    )
                )
                for chunk, numbers in zip(chunks, ids, strict=True)
            ]
        ).float()

    def describe(self) -> dict[str, Any]:
        """Kind and settings."""
        return {"retriever": "bm25", **self._settings}


class DenseRetriever:
    """Nearest embeddings.

    Args:
        database: whose chunks are found.
        encoder: that made the embeddings; embeds what is looked up in the same way.
        embeddings: of the database.
        index: of the embeddings, from `memlm.index`.

    Raises:
        FingerprintError: if they do not belong together.
    """

    def __init__(
        self, database: ChunkDatabase, encoder: ChunkEncoder, embeddings: Embeddings, index: Index
    ):
        if encoder.fingerprint != embeddings.encoder_fingerprint:
            raise FingerprintError(
                f"the encoder must be the one that made {embeddings.path}, but its fingerprint is "
                f"{encoder.fingerprint} and theirs {embeddings.encoder_fingerprint}; use that "
                "encoder or embed again"
            )
        if not len(index) == len(embeddings) == len(database):
            raise FingerprintError(
                f"index and embeddings must be of the database's {len(database):,} chunks, got "
                f"{len(index):,} and {len(embeddings):,}; embed and index again"
            )
        self.database, self.encoder = database, encoder
        self.embeddings, self.index = embeddings, index
        self.fingerprint = fingerprint(
            [self.describe(), embeddings.fingerprint, database.fingerprint]
        )

    def search(
        self,
        chunks: Chunks,
        k: int,
        exclusion: Exclusion | None = None,
        *,
        numbers: Numbers | None = None,
    ) -> SearchResult:
        """See `Retriever.search`."""
        if numbers is None:
            queries = self.encoder.encode(chunks)
        else:
            queries = self.embeddings.gather(torch.from_numpy(numbers))
        return search_without(self.index, queries, k, _with_deleted(self.database, exclusion))

    def describe(self) -> dict[str, Any]:
        """Kind and settings."""
        return {
            "retriever": "dense",
            "encoder": self.encoder.describe(),
            "index": self.index.describe(),
        }


class RerankedRetriever:
    """The best of a dense search in the order of BM25.

    Args:
        dense: recalls candidates.
        bm25: of the same database; orders them.
        recall: how many candidates.

    Raises:
        InputError: if the databases differ or ``recall`` is below 1.
    """

    def __init__(self, dense: DenseRetriever, bm25: Bm25Retriever, *, recall: int = 100):
        check(recall >= 1, f"recall must be at least 1, got {recall}")
        check(
            dense.database.fingerprint == bm25.database.fingerprint,
            "both retrievers must search one database, got those of "
            f"{dense.database.path} and {bm25.database.path}",
        )
        self.database, self.dense, self.bm25, self.recall = dense.database, dense, bm25, recall
        self.fingerprint = fingerprint([recall, dense.fingerprint, bm25.fingerprint])

    def search(
        self,
        chunks: Chunks,
        k: int,
        exclusion: Exclusion | None = None,
        *,
        numbers: Numbers | None = None,
    ) -> SearchResult:
        """See `Retriever.search`; equal BM25 scores keep the order of the dense search."""
        candidates = self.dense.search(chunks, max(k, self.recall), exclusion, numbers=numbers)
        lexical = self.bm25.scores(chunks, candidates.ids.clamp(min=0))
        lexical = lexical.masked_fill(candidates.ids < 0, -torch.inf)
        order = lexical.argsort(dim=1, descending=True, stable=True)[:, :k]
        return SearchResult(lexical.gather(1, order), candidates.ids.gather(1, order))

    def describe(self) -> dict[str, Any]:
        """Kind and settings."""
        return {
            "retriever": "reranked",
            "recall": self.recall,
            "dense": self.dense.describe(),
            "bm25": self.bm25.describe(),
        }


def own_documents(database: ChunkDatabase, chunks: NDArray[np.integer]) -> Exclusion:
    """Leave out, for each of some chunks of the database itself, all chunks of its document."""
    first, end = database.own_range(chunks)
    return Exclusion(first=torch.from_numpy(first), end=torch.from_numpy(end))


def _with_deleted(database: ChunkDatabase, exclusion: Exclusion | None) -> Exclusion | None:
    if not database.deleted.any():
        return exclusion
    dead = torch.from_numpy(database.dead_chunks())
    if exclusion is None:
        return Exclusion(dead=dead)
    return exclusion._replace(dead=dead if exclusion.dead is None else dead | exclusion.dead)
