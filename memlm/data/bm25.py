"""BM25 over token numbers: the best blocks for many queries, fast and exact.

    s(q, b) = sum over tokens t of q of impact(t, b)
    impact(t, b) = idf(t) f(t, b) / (f(t, b) + k1 (1 - b + b |b| / mean length))

(Robertson et al. 1995, in Lucene's variant). No text is needed, so any tokenizer and language will
do. A query is a set: its rarest tokens, each once.

Impacts come from bm25s. The sums are made here, since 100,000 queries against 100,000 blocks are
too many to be asked one by one. Tokens that stand in many blocks are one matrix product, and only
rare ones go over lists of blocks:

    1. a float32 sum for all blocks         dense product of frequent tokens + lists of rare ones
    2. blocks that may be among the best    within the sum's error bound of the k-th highest
    3. an exact sum for those               impacts are multiples of 2^-40, so that adding them in
                                            float64 rounds nothing and no order matters

So the answer does not depend on how queries are cut into parts, on which tokens count as frequent
or on the matrix product of a processor.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.optional import require

Blocks = Sequence[NDArray[np.integer]]

_FREQUENT = 1 / 16  # of the blocks; a rarer token costs less as a list than in a product
_GRID = 2.0**-40
_SUMS = 1 << 23  # queries x blocks (or frequent tokens) that are held at once: 32 MiB
_GROUPS = 64  # of blocks, of which only the highest sum is looked at first


class Found(NamedTuple):
    """The best blocks of some queries.

    Attributes:
        scores: ``(queries, k)`` float64, descending; -inf where there are fewer.
        numbers: ``(queries, k)`` int64 numbers of blocks, ties by lower number; -1 there.
    """

    scores: NDArray[np.float64]
    numbers: NDArray[np.int64]


class BlockScores:
    """BM25 of blocks of tokens.

    Held in memory: 16 bytes for every token of a block (each counted once), and a float32 for every
    pair of a block and a frequent token; while searching also 32 MiB of sums.

    Args:
        blocks: token numbers of each block.
        k1: saturation of repeated tokens.
        b: normalisation by length.

    Raises:
        MissingExtraError: without bm25s.
    """

    def __init__(self, blocks: Blocks, *, k1: float = 0.9, b: float = 0.4):
        bm25s = require("bm25s", extra="bm25", purpose="find similar blocks of text")
        self._tokens, places = np.unique(np.concatenate(blocks), return_inverse=True)
        self._count = len(blocks)
        index = bm25s.BM25(k1=k1, b=b)
        terms = np.split(places, np.cumsum([len(block) for block in blocks])[:-1])
        vocabulary = {str(token): term for term, token in enumerate(self._tokens.tolist())}
        shared = np.arange(len(self._tokens)).astype(object)  # one object a token, not one a place
        ids = [shared[row].tolist() for row in terms]
        corpus = bm25s.tokenization.Tokenized(ids=ids, vocab=vocabulary)
        index.index(corpus, show_progress=False)
        by_term = index.scores
        impacts = (np.rint(by_term["data"].astype(np.float64) / _GRID) * _GRID).astype(np.float32)
        self._starts, self._numbers, self._impacts = by_term["indptr"], by_term["indices"], impacts
        self._frequency: NDArray[np.int64] = np.diff(self._starts)  # blocks that hold each token
        # the same entries block by block
        order = np.argsort(self._numbers, kind="stable")
        term = np.repeat(np.arange(len(self._tokens), dtype=np.int32), self._frequency)
        self._block_terms, self._block_impacts = term[order], impacts[order]
        held = np.bincount(self._numbers, minlength=self._count)
        self._block_starts = np.concatenate([[0], np.cumsum(held)])
        self._product, self._column = self._frequent()

    def search(
        self,
        queries: Blocks,
        k: int,
        *,
        query_terms: int,
        fewest: int = 1,
        without: Sequence[slice] | None = None,
        dead: NDArray[np.bool_] | None = None,
    ) -> Iterator[Found]:
        """The best blocks of every query, some queries at a time.

        Args:
            queries: token numbers of each; every number counts once, and one that no block holds
                does not count.
            k: blocks for each; one that shares no token is never found.
            query_terms: rarest tokens of a query that are looked up.
            fewest: blocks a token must stand in to be looked up.
            without: the blocks that each query is not to find.
            dead: ``(blocks,)`` those that no query is to find.

        Yields:
            The answer to the next queries.
        """
        size = max(1, _SUMS // max(self._product.shape))
        for start in range(0, len(queries), size):
            asked = [
                self._asked(query, query_terms, fewest) for query in queries[start : start + size]
            ]
            sums = self._sums(asked)
            if dead is not None:
                sums[:, : self._count][:, dead] = 0
            found = Found(np.full((len(asked), k), -np.inf), np.full((len(asked), k), -1, np.int64))
            for row, terms in enumerate(asked):
                if without is not None:
                    sums[row, : self._count][without[start + row]] = 0
                candidates = _candidates(sums[row], k, len(terms))
                scores = self._exact(terms, candidates)
                best = np.argsort(-scores, kind="stable")[:k]
                found.scores[row, : len(best)] = scores[best]
                found.numbers[row, : len(best)] = candidates[best]
            yield found

    def of(
        self, query: NDArray[np.integer], numbers: NDArray[np.integer], *, query_terms: int
    ) -> NDArray[np.float64]:
        """Scores of some blocks, by number, for a query; see `search`."""
        return self._exact(self._asked(query, query_terms, 1), np.asarray(numbers))

    def _asked(
        self, query: NDArray[np.integer], query_terms: int, fewest: int
    ) -> NDArray[np.integer]:
        """Which tokens of the index a query looks up."""
        wanted = np.unique(query)
        places = np.minimum(np.searchsorted(self._tokens, wanted), len(self._tokens) - 1)
        asked = places[self._tokens[places] == wanted]
        asked = asked[self._frequency[asked] >= fewest]
        return asked[np.argsort(self._frequency[asked], kind="stable")[:query_terms]]

    def _frequent(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Impacts of frequent tokens, ``(tokens, blocks)``, and the row of every token (or -1)."""
        frequent = np.flatnonzero(self._frequency > _FREQUENT * self._count)
        column = np.full(len(self._tokens), -1)
        column[frequent] = np.arange(len(frequent))
        width = -(-self._count // _GROUPS) * _GROUPS
        product = np.zeros((len(frequent), width), np.float32)
        for row, term in enumerate(frequent):
            entries = slice(self._starts[term], self._starts[term + 1])
            product[row, self._numbers[entries]] = self._impacts[entries]
        return product, column

    def _sums(self, asked: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        """Sums for all blocks, ``(queries, blocks and a few that are none)``."""
        chosen = np.zeros((len(asked), len(self._product)), np.float32)
        for row, terms in enumerate(asked):
            columns = self._column[terms]
            chosen[row, columns[columns >= 0]] = 1
        sums = chosen @ self._product
        for row, terms in enumerate(asked):
            rare = terms[self._column[terms] < 0]
            entries = _runs(self._starts[rare], self._frequency[rare])
            sums[row] += np.bincount(
                self._numbers[entries], self._impacts[entries], minlength=sums.shape[1]
            )
        return sums

    def _exact(
        self, terms: NDArray[np.integer], numbers: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Exact sums for some blocks."""
        looked_up = np.zeros(len(self._tokens))
        looked_up[terms] = 1
        starts = self._block_starts[numbers]
        lengths = self._block_starts[numbers + 1] - starts
        entries = _runs(starts, lengths)
        parts = looked_up[self._block_terms[entries]] * self._block_impacts[entries]
        place = np.repeat(np.arange(len(numbers)), lengths)
        return np.bincount(place, parts, minlength=len(numbers)).astype(np.float64)


def _runs(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.integer]:
    """``start, start + 1, ...`` of every length, one after another."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def _candidates(sums: NDArray[np.float32], k: int, terms: int) -> NDArray[np.int64]:
    """All blocks that may be among the k best, ascending, of float32 sums of so many terms.

    A sum of m numbers that are not negative is wrong by a factor between 1 - m 2^-24 and its
    inverse, in any order. So the k-th highest is, and what is lower by more than both errors
    together is not among the best.
    """
    slack = 1 - 4 * (terms + 1) * 2.0**-24
    above_zero = float(np.finfo(np.float32).tiny)
    peaks = sums.reshape(_GROUPS, -1).max(axis=0)  # k of them are as high as the k-th
    bound = slack * float(np.partition(peaks, -k)[-k]) if k <= len(peaks) else 0.0
    candidates = np.flatnonzero(sums >= max(bound, above_zero))
    if len(candidates) > k:
        highest = sums[candidates]
        bound = slack * float(np.partition(highest, -k)[-k])
        candidates = candidates[highest >= bound]
    return candidates
