"""FAISS behind the contract: signs, missing ids, ties, casts, nprobe, threads, decoding."""

import faiss
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from index.stores import normal
from memlm.core.errors import CorruptStoreError, InputError
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex, faiss_threads
from memlm.index.plan import IndexConfig

KEYS = normal(2000, 16, seed=1)
QUERIES = normal(11, 16, seed=2)
FACTORIES = ["Flat", "IVF8,Flat", "IVF8,PQ4x4", "HNSW16", "SQ8", "IDMap,Flat", "IVF8,PQ4x4fs"]
FACTORIES += ["OPQ4,IVF8,PQ4x4", "IVF8,Flat,RFlat", "PCAR8,IVF8,Flat"]


def built(factory, keys=KEYS, metric="l2", **settings):
    config = IndexConfig(factory=factory, metric=metric, recall_queries=0, **settings)
    return build_index(keys, config, quiet=True)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_flat_agrees_with_exact_search(metric, dtype):
    index, exact = built("Flat", metric=metric), ExactIndex(KEYS, metric)
    found, wanted = index.search(QUERIES.to(dtype), 20), exact.search(QUERIES.to(dtype).float(), 20)
    assert found.scores.dtype == torch.float32
    assert_close(found.scores, wanted.scores, rtol=1e-5, atol=2e-5)
    assert_close(found.ids, wanted.ids)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_every_index_type_keeps_the_contract(factory, metric):
    index = built(factory, metric=metric, nprobe=2)
    found = index.search(QUERIES, 40)
    assert found.scores.shape == found.ids.shape == (11, 40)
    valid = found.ids >= 0
    assert valid.any()
    assert (found.ids < 2000).all()
    assert torch.isneginf(found.scores[~valid]).all()
    assert torch.isfinite(found.scores[valid]).all()
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
    assert (valid[:, 1:] <= valid[:, :-1]).all()
    if metric == "l2":
        assert (found.scores <= 0).all()
        # Nearer than chance: the sign is right.
        distances = torch.cdist(QUERIES, KEYS)
        near = distances.gather(1, found.ids.clamp(min=0))[valid].mean()
        assert near < 0.85 * distances.mean()


@pytest.mark.parametrize("factory", ["IVF8,Flat", "IVF8,Flat,RFlat", "PCAR8,IVF8,Flat"])
def test_nprobe_reaches_wrapped_lists(factory):
    one, all_lists = built(factory, nprobe=1), built(factory, nprobe=99)
    assert one.describe()["nprobe"] == 1
    assert all_lists.describe()["nprobe"] == 8
    exact = set(ExactIndex(KEYS).search(QUERIES[:1], 100).ids[0].tolist())
    hits = [len(exact & set(i.search(QUERIES[:1], 100).ids[0].tolist())) for i in (one, all_lists)]
    assert hits[0] < hits[1]


def test_nprobe_without_lists_is_ignored():
    assert built("Flat", nprobe=7).describe()["nprobe"] is None


def test_missing_neighbours_are_masked():
    index = built("IVF8,Flat", keys=KEYS[:320], nprobe=1)
    found = index.search(QUERIES, 320)
    assert (found.ids == -1).any()
    assert torch.isneginf(found.scores[found.ids == -1]).all()
    assert (found.ids.sort(descending=True).values != -2).all()


def test_more_neighbours_than_keys():
    found = built("Flat", keys=KEYS[:5]).search(QUERIES, 9)
    assert (found.ids[:, :5].sort().values == torch.arange(5)).all()
    assert (found.ids[:, 5:] == -1).all()


def test_returned_ties_are_ordered_by_id():
    keys = KEYS[:10].repeat(6, 1)[torch.randperm(60, generator=torch.Generator().manual_seed(3))]
    for factory in ("Flat", "IVF1,Flat", "HNSW8"):
        found = built(factory, keys=keys).search(QUERIES, 60)
        tied = found.scores[:, 1:] == found.scores[:, :-1]
        assert tied.any()
        assert (found.ids[:, 1:] > found.ids[:, :-1])[tied & (found.ids[:, 1:] >= 0)].all()


def test_ties_that_faiss_returns_in_another_order_are_ordered():
    index = built("Flat")

    class Disordered:
        def search(self, queries, k):
            distances = np.array([[1.0, 2.0, 2.0, 2.0, 3e38]], np.float32)
            return distances, np.array([[9, 8, 3, 5, -1]])

    index._index = Disordered()
    found = index.search(QUERIES[:1], 5)
    assert found.ids.tolist() == [[9, 3, 5, 8, -1]]
    assert found.scores.tolist() == [[-1.0, -2.0, -2.0, -2.0, -np.inf]]


@pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat", "SQ8", "IVF8,PQ4x4", "OPQ4,IVF8,PQ4x4"])
def test_reconstruct_decodes_what_search_compared(factory):
    index = built(factory)
    ids = torch.tensor([[3, 1999], [0, 3]])
    keys = index.reconstruct(ids)
    assert keys.shape == (2, 2, 16)
    assert_close(keys[0, 0], keys[1, 1])
    found = index.search(QUERIES, 10)
    distances = (index.reconstruct(found.ids) - QUERIES.unsqueeze(1)).square().sum(-1)
    assert_close(-found.scores, distances, rtol=1e-4, atol=1e-3)
    if "PQ" not in factory:
        assert_close(index.reconstruct(torch.arange(2000)), KEYS, rtol=0, atol=0.05)


def test_reconstructed_cosine_keys_have_length_one():
    keys = built("Flat", metric="cosine").reconstruct(torch.arange(5))
    assert_close(keys, torch.nn.functional.normalize(KEYS[:5]))


def test_a_type_that_cannot_decode_says_so():
    with pytest.raises(InputError, match="PCAW8,Flat cannot decode"):
        built("PCAW8,Flat").reconstruct(torch.tensor([0]))


def test_an_index_without_keys_is_refused():
    with pytest.raises(InputError, match="must hold keys, got an empty one"):
        FaissIndex(faiss.IndexFlatL2(4))


@pytest.mark.parametrize("count", [1, 2])
def test_threads_are_restored_in_faiss_and_torch(count):
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    with faiss_threads(count) as inside:
        assert inside == faiss.omp_get_max_threads() == count
    with pytest.raises(RuntimeError), faiss_threads(count):
        raise RuntimeError
    index = FaissIndex(built("Flat")._index, threads=count)
    index.search(QUERIES, 3)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before


def test_a_foreign_file_is_wrapped(tmp_path):
    raw = faiss.index_factory(16, "IVF4,Flat")
    raw.train(KEYS.numpy())
    raw.add_with_ids(KEYS.numpy(), np.arange(2000))
    faiss.write_index(raw, str(tmp_path / "any.index"))
    index = FaissIndex.from_file(tmp_path / "any.index", nprobe=4, store_fingerprint="abc")
    wanted = ExactIndex(KEYS).search(QUERIES, 5)
    assert_close(index.search(QUERIES, 5).ids, wanted.ids)
    assert index.store_fingerprint == "abc"
    assert index.describe()["recall"] is None
    (tmp_path / "any.index").write_bytes(b"no index at all")
    for name in ("any.index", "none.index"):
        with pytest.raises(CorruptStoreError, match="must be a FAISS index"):
            FaissIndex.from_file(tmp_path / name)
