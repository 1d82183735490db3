"""Recall is the share of the exact neighbours found, on queries that the index does not hold."""

import pytest
import torch

from index.stores import MemoryStore, normal
from memlm.core.types import SearchResult
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.keys import drop_own
from memlm.index.plan import IndexConfig
from memlm.index.recall import measure_recall

KEYS = normal(3000, 8, seed=1)


class Forgetful:
    """Exact search that misses every entry whose id is below ``lost``."""

    metric = "l2"

    def __init__(self, lost):
        self.exact = ExactIndex(KEYS)
        self.lost = lost

    def __len__(self):
        return len(KEYS)

    def search(self, queries, k):
        scores, ids = self.exact.search(queries, len(KEYS))
        kept = ids >= self.lost
        order = torch.argsort(~kept, dim=1, stable=True)[:, :k]
        kept = kept.gather(1, order)
        return SearchResult(
            scores.gather(1, order).masked_fill(~kept, -torch.inf),
            ids.gather(1, order).masked_fill(~kept, -1),
        )

    def describe(self):
        return {}

    def save(self, directory):
        pass


def test_exact_search_has_recall_one():
    for queries in (None, normal(20, 8, seed=2)):
        assert measure_recall(ExactIndex(KEYS), KEYS, 50, queries=queries).value == 1.0


@pytest.mark.parametrize("source", ["queries", "held keys"])
def test_recall_is_the_share_of_exact_neighbours_that_are_found(source):
    queries = normal(1500, 8, seed=2) if source == "queries" else None
    recall = measure_recall(Forgetful(1000), KEYS, 20, queries=queries, count=1000)
    assert (recall.k, recall.queries, recall.source) == (20, 1000, source)
    # A third of the keys is lost, without regard to where they are.
    assert recall.value == pytest.approx(2 / 3, abs=0.03)


def test_a_held_key_does_not_count_itself():
    class OnlyItself(Forgetful):
        def search(self, queries, k):
            scores, ids = self.exact.search(queries, k)
            rest = torch.arange(k) > 0
            return SearchResult(scores, ids.masked_fill(rest, -1))

    assert measure_recall(OnlyItself(0), KEYS, 1).value == 0.0


def test_the_store_may_be_smaller_than_k():
    assert measure_recall(ExactIndex(KEYS[:5]), KEYS[:5], 1024).k == 4
    assert measure_recall(ExactIndex(KEYS[:1]), KEYS[:1], 1024).value == 1.0
    index = build_index(KEYS[:5], IndexConfig(type="flat"))
    assert index.describe()["recall"] == {
        "k": 4,
        "queries": 5,
        "value": 1.0,
        "source": "held keys",
    }


def test_given_queries_are_named_in_the_description():
    queries = normal(30, 8, seed=3)
    index = build_index(KEYS, IndexConfig(type="flat", recall_k=8), queries=queries)
    recall = index.describe()["recall"]
    assert (recall["source"], recall["queries"], recall["k"]) == ("queries", 30, 8)


def test_cosine_and_ip_are_compared_by_their_own_metric():
    store = MemoryStore(KEYS, shard=700)
    for metric in ("ip", "cosine"):
        assert measure_recall(ExactIndex(KEYS, metric), store, 10).value == 1.0
        assert measure_recall(ExactIndex(KEYS, "l2"), store, 10).value == 1.0


def test_the_own_entry_is_dropped_where_it_is_found():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    ids = torch.tensor([[5, 6, 7], [5, 6, 7]])
    kept_scores, kept = drop_own(scores, ids, torch.tensor([6, 9]))
    assert kept.tolist() == [[5, 7], [5, 6]]
    assert kept_scores.tolist() == [[3, 1], [3, 2]]
