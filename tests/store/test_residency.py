"""Where keys and indexes live, and what that costs."""

import faiss
import pytest
import torch

from memlm.core.errors import InputError, MissingExtraError
from memlm.index.build import build_index, load_index
from memlm.index.plan import IndexConfig
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore
from memlm.store.residency import plan_residency, plan_store, residency_lines

CONFIG = IndexConfig(factory="IVF4,PQ4x4", nprobe=4, recall_queries=0)


@pytest.fixture
def store(tmp_path):
    keys = torch.randn(700, 8, generator=torch.Generator().manual_seed(0))
    places = {"documents": torch.zeros(700).long(), "positions": torch.arange(700)}
    values = torch.arange(700) % 9
    return save_arrays(tmp_path / "store", keys, values, **places, shard_rows=300, dtype="float16")


def test_keys_in_memory_are_the_keys(store):
    ids = torch.tensor([5, 650, 5])
    held = Datastore.open(store.path, keys="ram")
    assert torch.equal(held.gather(ids), store.gather(ids))
    # the file may go: what was read stays
    for file in store.path.glob("keys-*"):
        file.write_bytes(b"")
    assert held.gather(ids).isfinite().all()
    assert held.describe()["keys"] == "ram"
    with pytest.raises(InputError, match="'disk' or in 'ram', got 'gpu'"):
        Datastore.open(store.path, keys="gpu")


def test_a_mapped_index_answers_as_one_in_memory(store):
    build_index(store, CONFIG, directory=store.path / "index", quiet=True)
    queries = torch.randn(5, 8)
    loaded, mapped = (
        load_index(store.path / "index", store, residency=where) for where in ("ram", "disk")
    )
    for found, expected in zip(mapped.search(queries, 9), loaded.search(queries, 9), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(InputError, match="residency must be one of ram, disk, gpu, got 'tape'"):
        load_index(store.path / "index", store, residency="tape")


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="FAISS has a GPU part here")
def test_without_a_gpu_part_of_faiss(store):
    build_index(store, CONFIG, directory=store.path / "index", quiet=True)
    with pytest.raises(MissingExtraError, match="FAISS with its GPU part"):
        load_index(store.path / "index", store, residency="gpu")


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(faiss, "StandardGpuResources"), reason="FAISS has no GPU part here")
def test_an_index_on_the_gpu_answers_as_one_in_memory(store):
    config = IndexConfig(factory="IVF4,Flat", nprobe=4, recall_queries=0)
    build_index(store, config, directory=store.path / "index", quiet=True)
    queries = torch.randn(5, 8)
    here, there = (
        load_index(store.path / "index", store, residency=where).search(queries, 9)
        for where in ("ram", "gpu")
    )
    assert torch.equal(here.ids, there.ids)
    torch.testing.assert_close(here.scores, there.scores)


def test_the_plan_is_what_lies_on_disk(store):
    files = sum(sum(shard.sizes.values()) for shard in store.manifest.shards)
    planned = plan_store(700, 8, 2)
    assert planned <= files <= planned + 300 * len(store.manifest.shards) * 3
    parts = {part.name: part for part in plan_residency(700, 8, 2, index_bytes=1000)}
    assert (parts["keys"].where, parts["keys"].disk, parts["keys"].memory) == ("disk", 11200, 0)
    assert (parts["index"].where, parts["index"].disk, parts["index"].memory) == ("ram", 1000, 1000)
    assert sum(part.disk for part in parts.values()) == planned + 1000
    coded = {part.name: part for part in plan_residency(700, 8, 2, code_size=3, index_bytes=1000)}
    assert (coded["keys"].where, coded["keys"].disk) == ("absent", 0)
    assert (coded["codes"].disk, coded["index"].disk) == (2100, 0)
    assert "together" in residency_lines(list(parts.values()))[-1]
