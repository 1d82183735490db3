"""Exact search is a full sort by (score descending, id ascending), whatever the blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from index.stores import MemoryStore, normal
from memlm.index import exact
from memlm.index.exact import ExactIndex


def naive(keys, queries, k, metric):
    """A loop over queries in float64 and a full sort."""
    keys, queries = keys.double().numpy(), queries.double().numpy()
    all_scores, all_ids = [], []
    for query in queries:
        if metric == "l2":
            scores = -((keys - query) ** 2).sum(1)
        else:
            scores = keys @ query
            if metric == "cosine":
                scores /= np.linalg.norm(keys, axis=1) * np.linalg.norm(query)
        order = np.lexsort((np.arange(len(keys)), -scores))[:k]
        all_scores.append(scores[order])
        all_ids.append(order)
    return torch.tensor(np.array(all_scores)), torch.tensor(np.array(all_ids))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 keys and 3 queries, so that little data has many of them."""
    index_init = ExactIndex.__init__

    def init(self, *args, **kwargs):
        index_init(self, *args, **kwargs)
        self._rows = 64
        self._queries = 3

    monkeypatch.setattr(ExactIndex, "__init__", init)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("count", [1, 5, 64, 65, 500])
@pytest.mark.parametrize("k", [1, 5, 70, 500])
def test_float64_search_is_a_full_sort(metric, count, k):
    keys, queries = normal(count, 6, seed=1), normal(7, 6, seed=2)
    scores, ids = naive(keys, queries, k, metric)
    found = ExactIndex(keys, metric).search(queries.double(), k)
    found_count = min(k, count)
    assert found.scores.shape == found.ids.shape == (7, k)
    assert_close(found.ids[:, :found_count], ids)
    assert_close(found.scores[:, :found_count], scores, rtol=0, atol=1e-12)
    assert (found.ids[:, found_count:] == -1).all()
    assert torch.isneginf(found.scores[:, found_count:]).all()


@pytest.mark.usefixtures("small_blocks")
@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 300),
    k=st.integers(1, 40),
    levels=st.integers(1, 3),
    order=st.sampled_from(["random", "rising", "falling"]),
)
def test_ties_go_to_the_lower_id_also_at_the_boundary(seed, count, k, levels, order):
    # Keys on a coarse grid: nearly everything ties, and integers make float32 exact.
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, levels + 1, (count, 2), generator=generator).float()
    if order != "random":
        near = keys.sum(1).sort(descending=order == "rising", stable=True).indices
        keys = keys[near]
    queries = torch.zeros(4, 2)
    _, ids = naive(keys, queries, k, "l2")
    found = ExactIndex(keys.half()).search(queries, k)
    assert found.ids[:, : min(k, count)].tolist() == ids.tolist()


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shard", [1000, 301, 77])
def test_equal_keys_tie_wherever_they_lie(rows, shard):
    keys = normal(1, 32, seed=3).repeat(1000, 1)
    found = ExactIndex(MemoryStore(keys, shard=shard)).search(normal(rows, 32, seed=4), 50)
    assert (found.scores == found.scores[:, :1]).all()
    assert (found.ids == torch.arange(50)).all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_of_any_dtype_from_memory_or_from_shards(metric, dtype):
    keys, queries = normal(400, 16, seed=5, dtype=dtype), normal(9, 16, seed=6)
    scores, _ = naive(keys, queries, 30, metric)
    whole = ExactIndex(keys, metric).search(queries, 30)
    parts = ExactIndex(MemoryStore(keys, shard=170), metric).search(queries, 30)
    assert whole.scores.dtype == torch.float32
    assert_close(whole.scores.double(), scores, rtol=1e-5, atol=1e-5)
    assert_close(parts.scores, whole.scores, rtol=1e-5, atol=1e-5)
    assert_close(parts.ids, whole.ids)


def test_a_query_that_is_a_key_scores_at_most_zero():
    keys = normal(200, 24, seed=7) * 100
    found = ExactIndex(keys).search(keys, 3)
    assert (found.scores <= 0).all()
    assert (found.ids[:, 0] == torch.arange(200)).all()


def test_half_precision_queries_and_autocast_do_not_change_the_arithmetic():
    keys, queries = normal(300, 16, seed=8), normal(5, 16, seed=9, dtype=torch.bfloat16)
    index = ExactIndex(keys)
    plain = index.search(queries.float(), 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = index.search(queries, 10)
    assert_close(cast.scores, plain.scores, rtol=0, atol=0)
    assert_close(cast.ids, plain.ids)


def test_no_queries_and_queries_that_need_gradients():
    index = ExactIndex(normal(10, 4))
    assert index.search(torch.empty(0, 4), 3).ids.shape == (0, 3)
    found = index.search(normal(2, 4).requires_grad_(), 3)
    assert not found.scores.requires_grad


def test_keys_are_read_once_per_search_and_the_store_stays_on_disk():
    store = MemoryStore(normal(500, 8))
    index = ExactIndex(store)
    store.reads = 0
    index.search(normal(600, 8), 4)
    assert store.reads == 1


def test_scores_never_exist_for_all_keys_at_once(monkeypatch):
    keys = normal(40_000, 8, dtype=torch.float16)
    index = ExactIndex(keys)
    assert index._rows <= 1 << 18
    monkeypatch.setitem(exact._BLOCK_NUMBERS, "cpu", 8 * 1024)
    index = ExactIndex(keys)
    widths = []
    original = ExactIndex._score

    def spy(self, queries, block, norms, out):
        widths.append(tuple(out.shape))
        return original(self, queries, block, norms, out)

    monkeypatch.setattr(ExactIndex, "_score", spy)
    index.search(normal(300, 8), 4)
    assert set(widths) == {(256, 1024), (44, 1024)}


def test_describe_says_that_nothing_is_missed():
    described = ExactIndex(normal(10, 4), "ip").describe()
    assert described["engine"] == "exact"
    assert described["metric"] == "ip"
    assert described["recall"]["value"] == 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_keys_on_a_gpu(metric):
    keys, queries = normal(300_000, 64, seed=1, dtype=torch.float16), normal(2500, 64, seed=2)
    wanted = ExactIndex(keys, metric).search(queries, 100)
    found = ExactIndex(keys.cuda(), metric).search(queries.cuda(), 100)
    assert found.ids.is_cuda
    assert_close(found.scores.cpu(), wanted.scores, rtol=1e-4, atol=1e-4)
    assert (found.ids.cpu() == wanted.ids).float().mean() > 0.999
