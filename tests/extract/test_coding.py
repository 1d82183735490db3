"""A store of codes: no whole key on disk, and the index that a store of whole keys would have."""

import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.extract.build import build_datastore
from memlm.extract.coding import plan_codes
from memlm.extract.config import ExtractionConfig
from memlm.extract.recompute import recompute_sample
from memlm.index.build import build_index
from memlm.index.plan import IndexConfig
from memlm.index.record import IndexRecord
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.store.codec import CODEC, CODEC_RECORD
from memlm.store.deleted import delete_documents
from memlm.store.reader import Datastore
from memlm.store.rewrite import compact_store
from memlm.store.verify import verify
from memlm.testing.tiny import tiny_model

FACTORY = "IVF4,PQ4x4"  # 39 points for each of 16 centroids and no warnings
CODES = IndexConfig(factory=FACTORY, nprobe=3, recall_queries=0)
CONFIG = ExtractionConfig(shard_entries=150, batch_tokens=128, threads=1)
WINDOWS = SlidingWindows(length=32, stride=16)


@pytest.fixture(scope="module")
def corpus():
    draw = np.random.default_rng(3)
    text = [draw.integers(3, 50, length) for length in (500, 300)]
    return TokenCorpus.from_tokens(np.concatenate(text), offsets=np.array([0, 500, 800]))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def build(model, corpus, path, codes=CODES, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_datastore(
            model,
            None,
            corpus,
            path,
            windows=WINDOWS,
            config=replace(CONFIG, **changes),
            codes=codes,
            progress=False,
        )


@pytest.fixture(scope="module")
def small(model, corpus, tmp_path_factory):
    return build(model, corpus, tmp_path_factory.mktemp("codes") / "store")


@pytest.fixture(scope="module")
def full(model, corpus, tmp_path_factory):
    return build(model, corpus, tmp_path_factory.mktemp("whole") / "store", codes=None)


def queries(dim, count=9):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("factory", [FACTORY, "PCA8,IVF4,PQ4x4"])
def test_it_finds_what_an_index_of_whole_keys_finds(factory, metric, model, corpus, tmp_path):
    """The sample is all of the text, so that training is the same."""
    codes = replace(CODES, factory=factory)
    small = build(model, corpus, tmp_path / "small", codes, metric=metric)
    full = build(model, corpus, tmp_path / "full", None, metric=metric)
    index = build_index(full, replace(codes, metric=metric), quiet=True)
    expected = index.search(queries(full.dim), 20)
    found = KnnMemory(small, k=20).index.search(queries(full.dim), 20)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_no_whole_key_is_on_disk(small, full):
    files = {file.name.partition("-")[0] for file in small.path.glob("*-*.safetensors")}
    assert files == {"codes", "values", "documents"}
    size, whole = (
        sum(file.stat().st_size for file in store.path.glob("[ck]*-*.safetensors"))
        for store in (small, full)
    )
    assert size < whole / 4
    assert torch.equal(small.values, full.values)
    assert torch.equal(small.positions, full.positions)


def test_the_planned_bytes_are_those_on_disk(small):
    plan = plan_codes(len(small), small.dim, CODES)
    shards = small.manifest.shards
    found = sum(sum(shard.sizes.values()) for shard in shards)
    headers = 400 * len(shards)
    assert plan.bytes <= found <= plan.bytes + headers
    assert f"{len(small):,} entries of 3 + 12 bytes" in plan.text


def test_keys_are_what_the_codes_stand_for(small, full):
    decoded = small.load_keys()
    assert decoded.dtype == full.dtype
    ids = torch.tensor([3, 400, 7, 7])
    assert torch.equal(small.gather(ids), decoded[ids])
    near = (decoded.float() - full.load_keys().float()).norm(dim=1)
    apart = (full.load_keys().float() - full.load_keys().float().mean(0)).norm(dim=1)
    assert near.mean() < 0.8 * apart.mean()


def test_it_can_be_walked_and_edited(small, tmp_path):
    memory = AutomatonMemory(small, k=4, min_knns=1, max_knns=8)
    state = memory.init_state(2)
    state = memory.observe(
        torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, small.dim), state
    )
    candidates, _ = memory.read(queries(small.dim, 2), state)
    assert candidates.valid.any()
    shutil.copytree(small.path, tmp_path / "copy")
    store = delete_documents(Datastore.open(tmp_path / "copy"), [1])
    found, _ = KnnMemory(store, k=30).read(queries(small.dim))
    assert (store.documents[found.ids[found.valid]] == 0).all()
    with pytest.raises(InputError, match="a store of codes"):
        compact_store(store, tmp_path / "compact")


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify(level, small, model, corpus, tmp_path):
    report = verify(small.path, level, progress=False)
    assert report.ok
    assert recompute_sample(report, model, None, corpus).ok
    path = tmp_path / "copy"
    shutil.copytree(small.path, path)
    data = bytearray((path / CODEC).read_bytes())
    data[-5] ^= 1
    (path / CODEC).write_bytes(data)
    assert any("codes mean nothing" in problem for problem in verify(path, level).problems)
    with pytest.raises(CorruptStoreError, match="codes mean nothing"):
        KnnMemory(Datastore.open(path), k=2)


def test_a_build_that_died_goes_on(small, model, corpus, tmp_path, monkeypatch):
    """At the training, between codec and record, and between ranges."""
    import memlm.extract.build as building
    import memlm.extract.coding as coding

    def die(*arguments, **named):
        raise KeyboardInterrupt

    path = tmp_path / "store"
    for place, name in ((coding, "write_faiss"), (coding, "write_json"), (building, "encode")):
        monkeypatch.setattr(place, name, die)
        with pytest.raises(KeyboardInterrupt):
            build(model, corpus, path)
        monkeypatch.undo()
    trained = []
    with monkeypatch.context() as patch:
        patch.setattr(coding, "train_faiss", lambda *a: trained.append(a))
        build(model, corpus, path)
    assert not trained, "the codec was there already"
    for file in small.path.glob("*.safetensors"):
        assert (path / file.name).read_bytes() == file.read_bytes()
    assert Datastore.open(path).fingerprint == small.fingerprint


def test_another_codec_or_store_is_refused(small, model, corpus):
    with pytest.raises(FingerprintError, match="holds the codec IVF4"):
        build(model, corpus, small.path, replace(CODES, seed=7))
    with pytest.raises(FingerprintError, match="codec is None here"):
        build(model, corpus, small.path, None)


def test_part_of_the_text_is_enough_to_train(model, corpus, tmp_path):
    store = build(model, corpus, tmp_path / "store", replace(CODES, train_size=300))
    assert IndexRecord.read(store.path, CODEC_RECORD).train_size == 300
    found, _ = KnnMemory(store, k=5).read(queries(store.dim))
    assert found.valid.all()
    assert_close(found.scores, found.scores.sort(1, descending=True).values)


@pytest.mark.parametrize("codes", [IndexConfig(type="flat"), IndexConfig(type="exact")])
def test_an_index_without_codes_is_refused(codes, model, corpus, tmp_path):
    with pytest.raises(InputError, match="needs an index that makes codes"):
        build(model, corpus, tmp_path / "store", codes)
