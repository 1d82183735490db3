"""How much of the truth an approximate index finds.

    recall@k = |found top k  and  exact top k| / |exact top k|

averaged over queries. Queries should be hidden states the index will meet; failing those, keys of
the store itself are held out one at a time: each looks for its neighbours with its own entry taken
out of both answers, since every index finds a query that it holds.

Entries are compared by id: among several equal keys at the k boundary an approximate index may
return another one, which counts as a miss. The figure is then too low, never too high.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.types import Index
from memlm.index.exact import ExactIndex
from memlm.index.keys import KeySource, as_keys, drop_own, held_keys
from memlm.index.metrics import check_k


class Recall(NamedTuple):
    """A measured recall.

    Attributes:
        k: neighbours compared.
        queries: how many queries it is the mean of.
        value: between 0 and 1.
        source: "queries" (given by the caller) or "held keys" (of the store, own entry excluded).
    """

    k: int
    queries: int
    value: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return self._asdict()


def measure_recall(
    index: Index,
    keys: Tensor | KeySource,
    k: int,
    *,
    queries: Tensor | None = None,
    count: int = 1000,
    seed: int = 1,
) -> Recall:
    """Compare an index with exact search.

    Args:
        index: over all of ``keys``.
        keys: of the store.
        k: neighbours, fewer if the store is smaller.
        queries: ``(queries, dim)`` hidden states that are not copies of keys; None: held keys.
        count: at most so many queries.
        seed: of the sample.

    Raises:
        InputError: for k below 1, no keys, or queries of another width.
    """
    check_k(k)
    source = as_keys(keys)
    exact = ExactIndex(keys, index.metric)
    if queries is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(queries), generator=generator)[:count].sort().values
        queries = queries[chosen.to(queries.device)]
        k = min(k, len(source))
        wanted, found = exact.search(queries, k).ids, index.search(queries, k).ids
        return Recall(k, len(queries), _share(wanted, found), "queries")
    k = min(k, len(source) - 1)
    if k == 0:
        return Recall(0, 0, 1.0, "held keys")
    own, held = held_keys(source, count, seed)
    wanted = drop_own(*exact.search(held, k + 1), own)[1]
    found = drop_own(*index.search(held, k + 1), own)[1]
    return Recall(k, len(held), _share(wanted, found), "held keys")


def _share(wanted: Tensor, found: Tensor) -> float:
    """The share of wanted ids (all valid, distinct in a row) that their row of found ids holds."""
    both = torch.cat([wanted, found.to(wanted.device)], dim=1).sort(dim=1).values
    hits = ((both[:, 1:] == both[:, :-1]) & (both[:, 1:] >= 0)).sum()
    return float(hits) / wanted.numel() if wanted.numel() else 1.0


def finds_itself(index: Index, keys: KeySource, *, sample: int = 32, seed: int = 1) -> bool:
    """Whether an index is of these keys: most of a sample of them find themselves.

    A key of the store has its own entry among its nearest eighth (at most 256 entries) by any
    index worth having; in an index of other keys one in eight does. Stores of fewer than 64 keys
    are too small to tell.

    Args:
        index: to test.
        keys: that it should be of.
        sample: keys to try.
        seed: of the sample.
    """
    if len(keys) < 64:
        return True
    own, held = held_keys(keys, sample, seed)
    found = index.search(held, min(256, len(keys) // 8)).ids.cpu()
    return bool((found == own.unsqueeze(1)).any(1).float().mean() >= 0.5)
