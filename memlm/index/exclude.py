"""Searching with some entries left out: deleted ones, and those that a query must not see.

    dead       entries that nobody finds any more
    own        a range of entries per query: its own document, or its own position

No index is asked to leave out anything. It is asked for more neighbours than wanted, what is
excluded is dropped, and the rows that then have too few ask again for twice as many, until they
have enough or the index has no more. So it is the same for every kind of index, exact or not, and
what comes out is what an index without the excluded entries would give (of an approximate one: with
the same training). FAISS's own selectors are ignored by some of its indexes and missing in others.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import Index, SearchResult


class Exclusion(NamedTuple):
    """What a search leaves out.

    Attributes:
        dead: ``(entries,)`` bool, or None.
        first: ``(queries,)`` int64, where each query's own range begins, or None.
        end: ``(queries,)`` int64, one past its end; an empty range where it has none.
    """

    dead: Tensor | None = None
    first: Tensor | None = None
    end: Tensor | None = None

    def rows(self, index: Tensor) -> "Exclusion":
        """What the queries ``index`` leave out."""
        if self.first is None or self.end is None:
            return self
        return self._replace(first=self.first[index], end=self.end[index])

    def hits(self, ids: Tensor) -> Tensor:
        """Which of the found ``(queries, n)`` entries are left out."""
        hits = torch.zeros_like(ids, dtype=torch.bool)
        if self.dead is not None:
            hits |= self.dead.to(ids.device)[ids.clamp(min=0)]
        if self.first is not None and self.end is not None:
            first, end = (part.to(ids.device).unsqueeze(1) for part in (self.first, self.end))
            hits |= (ids >= first) & (ids < end)
        return hits & (ids >= 0)


def search_without(
    index: Index, queries: Tensor, k: int, exclusion: Exclusion | None
) -> SearchResult:
    """The k nearest of the entries that are not left out, ``(queries, k)``.

    Args:
        index: of all entries.
        queries: ``(queries, dim)``.
        k: neighbours; columns beyond what is left hold score -inf and id -1.
        exclusion: None leaves out nothing.

    Raises:
        InputError: if the ranges are not one per query, or the index refuses the search.
    """
    if exclusion is None:
        return index.search(queries, k)
    check(
        exclusion.first is None or len(exclusion.first) == len(queries),
        f"one range must be left out per query, got {len(queries)} queries and "
        f"{0 if exclusion.first is None else len(exclusion.first)} ranges",
    )
    found = _kept(index.search(queries, min(2 * k, len(index))), k, exclusion)
    fetch, missing = 2 * k, _short(found)
    while len(missing) and fetch < len(index):
        fetch *= 4
        again = index.search(queries[missing], min(fetch, len(index)))
        more = _kept(again, k, exclusion.rows(missing))
        found.scores[missing], found.ids[missing] = more
        # a row that got no more entries than it asked for has seen all the index would give it
        missing = missing[(more.ids[:, -1] < 0) & (again.ids[:, -1] >= 0)]
    return found


def _kept(found: SearchResult, k: int, exclusion: Exclusion) -> SearchResult:
    """The first k columns that are not left out, padded with (-inf, -1)."""
    out = exclusion.hits(found.ids) | (found.ids < 0)
    order = torch.argsort(out.to(torch.uint8), dim=1, stable=True)[:, :k]
    left = out.gather(1, order)
    scores = found.scores.gather(1, order).masked_fill(left, -torch.inf)
    ids = found.ids.gather(1, order).masked_fill(left, -1)
    wide = (0, k - ids.shape[1])
    return SearchResult(
        torch.nn.functional.pad(scores, wide, value=-torch.inf),
        torch.nn.functional.pad(ids, wide, value=-1),
    )


def _short(found: SearchResult) -> Tensor:
    return (found.ids[:, -1] < 0).nonzero().squeeze(-1)
