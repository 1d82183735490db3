"""Plans keep their numbers, builds survive kills, and saved indexes know their store."""

import json
import os
import shutil
import warnings
from dataclasses import replace

import faiss
import pytest
import torch
from torch.testing import assert_close

from index.stores import MemoryStore, normal
from memlm.core.config import Config
from memlm.core.errors import CorruptStoreError, FingerprintError, InputError, StoreError
from memlm.index import build, faiss_index
from memlm.index.build import build_index, has_index, load_index
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.index.plan import IndexConfig, plan_index

STORE = MemoryStore(normal(12_000, 8, seed=1, dtype=torch.float16), shard=5000)
QUERIES = normal(7, 8, seed=2)
SMALL = IndexConfig(factory="IVF16,PQ4x4", nprobe=4, recall_k=10, recall_queries=50)


def same(a, b):
    assert_close(a.ids, b.ids)
    assert_close(a.scores, b.scores)


@pytest.mark.parametrize(
    ("count", "dim", "config", "factory", "train_size", "warned"),
    [
        (10_000_000, 1024, {}, "IVF4096,PQ64", 1_000_000, []),
        (1_000_000, 256, {}, "", 0, []),
        (1_000_000, 331, {}, "IVF4096,PQ1", 1_000_000, ["code_size must divide the 331.*using 1$"]),
        (1_000_000, 768, {}, "IVF4096,PQ64", 1_000_000, []),
        (1_000_000, 800, {}, "IVF4096,PQ50", 1_000_000, ["got 64; using 50"]),
        (
            100_000,
            64,
            {"type": "ivfpq"},
            "IVF2564,PQ64",
            100_000,
            ["4,096 lists need 159,744 training keys .39 each., got 100,000; using 2,564 lists"],
        ),
        (
            9_983,
            64,
            {"type": "ivfpq"},
            "Flat",
            0,
            ["need 9,984 training keys .39 for each of 256 centroids., got 9,983"],
        ),
        (9_984, 64, {"type": "ivfpq", "lists": 256}, "IVF256,PQ64", 9_984, []),
        (50, 8, {"type": "flat"}, "Flat", 0, []),
        (50, 8, {"factory": "SQ8"}, "SQ8", 50, []),
        (50, 8, {"factory": "HNSW8"}, "HNSW8", 50, []),
    ],
)
def test_a_plan_states_type_training_and_warnings(count, dim, config, factory, train_size, warned):
    plan = plan_index(count, dim, IndexConfig(**config))
    assert (plan.factory, plan.train_size) == (factory, train_size)
    assert plan.engine == ("faiss" if factory else "exact")
    assert len(plan.warnings) == len(warned)
    for message, words in zip(plan.warnings, warned, strict=True):
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(message)
    assert f"{count:,} keys of {dim} dimensions" in plan.text


def test_the_planned_bytes_are_those_of_the_file(tmp_path):
    for config in (
        IndexConfig(type="ivfpq", lists=32, code_size=1, recall_queries=0),
        IndexConfig(type="flat", recall_queries=0),
    ):
        plan = plan_index(len(STORE), STORE.dim, config)
        build_index(STORE, config, directory=tmp_path)
        size = (tmp_path / "index.faiss").stat().st_size
        assert plan.bytes == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize(
    ("kind", "factory"),
    [
        ("ivf", "IVF32,SQfp16"),
        ("ivfpq", "IVF32,PQ4"),
        pytest.param("opq", "OPQ4,IVF32,PQ4", marks=pytest.mark.slow),
        ("fastscan", "IVF32,PQ8x4fs"),
        ("hnsw", "HNSW32,SQfp16"),
    ],
)
def test_every_type_is_built_as_planned(kind, factory, tmp_path):
    config = IndexConfig(type=kind, lists=32, code_size=4, nprobe=32, recall_k=10)
    plan = plan_index(len(STORE), STORE.dim, config)
    assert (plan.factory, plan.warnings) == (factory, ())
    index = build_index(STORE, config, directory=tmp_path)
    assert plan.bytes == pytest.approx((tmp_path / "index.faiss").stat().st_size, rel=0.25)
    assert index.describe()["recall"]["value"] > (0.9 if kind in ("ivf", "hnsw") else 0.3)


@pytest.mark.parametrize(
    ("gigabytes", "factory"),
    [(60, "IVF4096,SQfp16"), (30, "IVF4096,PQ512"), (4, "IVF4096,PQ128"), (0.2, "IVF4096,PQ1")],
)
def test_memory_decides_what_is_built(gigabytes, factory):
    plan = plan_index(20_000_000, 1024, IndexConfig(memory=int(gigabytes * 1e9)))
    assert plan.factory == factory
    assert plan.bytes <= gigabytes * 1e9
    assert plan.seconds(1e11) > 1


def test_memory_that_holds_nothing():
    with pytest.raises(InputError, match=r"takes 197 MB \(IVF4096,PQ1\), got 1 MB of memory"):
        plan_index(20_000_000, 1024, IndexConfig(memory=1_000_000))
    with pytest.raises(InputError, match="memory decides which index is built, got 5 beside 'ivf'"):
        IndexConfig(type="ivf", memory=5)


def test_the_config_round_trips():
    assert IndexConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    assert isinstance(SMALL, Config)


def test_the_papers_preset_is_the_default():
    preset = IndexConfig()
    assert (preset.lists, preset.code_size, preset.nprobe) == (4096, 64, 32)
    assert (preset.train_size, preset.seed, preset.metric) == (1_000_000, 1, "l2")


def test_a_small_store_gets_a_flat_index_with_a_warning(capfd):
    config = IndexConfig(type="ivfpq", recall_queries=0)
    with pytest.warns(UserWarning, match=r"got 100; building an exact flat index"):
        index = build_index(STORE.keys[:100], config)
    same(index.search(QUERIES, 5), ExactIndex(STORE.keys[:100]).search(QUERIES, 5))
    assert capfd.readouterr().err == ""


def test_ivfpq_trains_quietly_with_enough_points_each(capfd):
    config = IndexConfig(type="ivfpq", lists=64, code_size=1, recall_queries=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = build_index(STORE, config, quiet=True)
    assert "WARNING" not in capfd.readouterr().err
    assert index.describe()["factory"] == "IVF64,PQ1"
    assert len(index) == len(STORE)


def test_auto_is_exact_for_small_stores_and_says_so():
    index = build_index(STORE)
    assert isinstance(index, ExactIndex)
    assert index.store_fingerprint == STORE.fingerprint


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("kind", ["exact", "flat", "lists"])
def test_saved_and_loaded_answers_are_the_same(tmp_path, metric, kind):
    config = {"type": kind} if kind != "lists" else {"factory": "IVF16,PQ4x4", "nprobe": 3}
    config = IndexConfig(**config, metric=metric, recall_k=10, recall_queries=20)
    assert not has_index(tmp_path)
    index = build_index(STORE, config, directory=tmp_path, quiet=True)
    assert has_index(tmp_path)
    assert not list(tmp_path.glob("building*"))
    loaded = load_index(tmp_path, STORE)
    same(loaded.search(QUERIES, 9), index.search(QUERIES, 9))
    assert loaded.describe() == index.describe()
    assert loaded.metric == metric
    again = tmp_path / "again"
    loaded.save(again)
    same(load_index(again, STORE).search(QUERIES, 9), index.search(QUERIES, 9))


def test_the_record_holds_what_is_needed_to_repeat(tmp_path):
    build_index(STORE, SMALL, directory=tmp_path, quiet=True)
    record = json.loads((tmp_path / "index.json").read_text())
    assert record["format_version"] == 1
    assert record["factory"] == "IVF16,PQ4x4"
    assert record["metric"] == "l2"
    assert (record["nprobe"], record["train_size"], record["seed"]) == (4, 12_000, 1)
    assert record["entries"] == 12_000
    assert record["faiss"] == faiss.__version__
    assert record["store_fingerprint"] == STORE.fingerprint
    assert record["checksum"].startswith("xxh3_128:")
    recall = record["recall"]
    assert (recall["k"], recall["queries"], recall["source"]) == (10, 50, "held keys")
    assert 0.2 < recall["value"] < 1


def test_another_nprobe_drops_the_measured_recall(tmp_path):
    build_index(STORE, SMALL, directory=tmp_path, quiet=True)
    assert load_index(tmp_path, nprobe=4).describe()["recall"] is not None
    described = load_index(tmp_path, nprobe=16).describe()
    assert (described["nprobe"], described["recall"]) == (16, None)


def test_another_store_is_refused_by_both_fingerprints(tmp_path):
    other = MemoryStore(STORE.keys * 2)
    for config in (SMALL, IndexConfig(type="exact")):
        build_index(STORE, config, directory=tmp_path, quiet=True)
        with pytest.raises(FingerprintError) as caught:
            load_index(tmp_path, other)
        assert STORE.fingerprint in str(caught.value)
        assert other.fingerprint in str(caught.value)


def edit(path, **values):
    record = json.loads(path.read_text())
    record.update(values)
    path.write_text(json.dumps(record))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: flip(d / "index.faiss"), "must have checksum .* but has .*build"),
        (lambda d: (d / "index.faiss").unlink(), "index.faiss must exist"),
        (lambda d: (d / "index.faiss").write_bytes(b""), "must have checksum"),
        (lambda d: (d / "index.json").unlink(), "index.json must exist"),
        (lambda d: (d / "index.json").write_text('{"kind'), "does not parse"),
        (lambda d: edit(d / "index.json", surprise=1), "no setting named surprise"),
        (lambda d: edit(d / "index.json", format_version=9), "newer than this memlm"),
        (lambda d: edit(d / "index.json", file="../index.faiss"), "a file beside it"),
        (lambda d: edit(d / "index.json", entries=7), "the store's 12000 keys .* holds 7"),
        (lambda d: edit(d / "index.json", dim=4), "8 dimensions but holds 12000 of 4"),
        (lambda d: (d / "index.json").write_text("{}"), "must describe an index"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, damage, words):
    build_index(STORE, SMALL, directory=tmp_path, quiet=True)
    damage(tmp_path)
    with pytest.raises(CorruptStoreError, match=words):
        load_index(tmp_path, STORE)


def test_a_record_that_lies_about_the_file_is_refused(tmp_path):
    build_index(STORE, SMALL, directory=tmp_path, quiet=True)
    edit(tmp_path / "index.json", entries=7)
    with pytest.raises(CorruptStoreError, match=r"must hold 7 keys .* but holds 12000"):
        FaissIndex.load(tmp_path)


def test_an_exact_index_needs_the_keys_back(tmp_path):
    build_index(STORE, directory=tmp_path)
    with pytest.raises(InputError, match="pass keys=store"):
        load_index(tmp_path)


class Dies(MemoryStore):
    """A store whose reader is killed at the n-th block of the n-th pass."""

    def __init__(self, store, at):
        super().__init__(store.keys, shard=store.shard)
        self.at = at

    def blocks(self, rows):
        for number, block in enumerate(super().blocks(rows)):
            if number == self.at:
                raise KeyboardInterrupt
            yield block


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(tmp_path, monkeypatch, at):
    monkeypatch.setattr(build, "_SAVE_EVERY", 4000)
    build_index(STORE, SMALL, directory=tmp_path / "whole", quiet=True)
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        build_index(Dies(STORE, at), SMALL, directory=broken, quiet=True)
    assert not has_index(broken)
    kept = faiss.read_index(str(broken / "building.faiss"))
    assert kept.is_trained
    assert kept.ntotal == 5000 * at

    def no_training(self):
        raise AssertionError("trained again")

    monkeypatch.setattr(build._Build, "_train", no_training)
    build_index(STORE, SMALL, directory=broken, quiet=True)
    for name in ("index.faiss", "index.json"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in broken.iterdir()) == ["index.faiss", "index.json"]


def test_another_build_does_not_go_on_from_this_one(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build_index(Dies(STORE, 1), SMALL, directory=tmp_path, quiet=True)
    shutil.copytree(tmp_path, tmp_path / "copy")
    other = IndexConfig(factory="IVF8,PQ4x4", nprobe=4, recall_queries=0)
    index = build_index(STORE, other, directory=tmp_path / "copy", quiet=True)
    assert index.describe()["factory"] == "IVF8,PQ4x4"
    assert len(load_index(tmp_path / "copy", STORE)) == len(STORE)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_half_index(tmp_path, monkeypatch, call):
    build_index(STORE, SMALL, directory=tmp_path, quiet=True)
    fails_from = [0]

    def full(*_):
        raise OSError(28, "No space left on device")

    real = getattr(os, call)

    def counted(*args):
        fails_from[0] -= 1
        return full() if fails_from[0] < 0 else real(*args)

    for step in range(12):
        fails_from[0] = step
        # Every attempt would write other bytes, so an old record never fits a new file.
        config = replace(SMALL, seed=step + 2)
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", counted)
            try:
                build_index(STORE, config, directory=tmp_path, quiet=True)
            except StoreError as error:
                assert "No space left" in str(error)  # noqa: PT017
            else:
                break
        if has_index(tmp_path):
            load_index(tmp_path, STORE)
    assert step >= 3
    assert not list(tmp_path.glob("*.tmp"))
    same(
        load_index(tmp_path, STORE).search(QUERIES, 5),
        build_index(STORE, config, quiet=True).search(QUERIES, 5),
    )


def test_the_seed_decides_the_training_sample(tmp_path):
    def trained(seed, name):
        config = IndexConfig(factory="IVF16,PQ4x4", train_size=2000, seed=seed, recall_queries=0)
        build_index(STORE, config, directory=tmp_path / name, quiet=True, threads=1)
        return (tmp_path / name / "index.faiss").read_bytes()

    assert trained(1, "a") == trained(1, "b")
    assert trained(1, "c") != trained(2, "d")


def test_building_restores_threads():
    before = faiss.omp_get_max_threads()
    build_index(STORE, SMALL, threads=1, quiet=True)
    assert faiss.omp_get_max_threads() == before


def test_writing_needs_no_second_copy(tmp_path, monkeypatch):
    index = build_index(STORE, SMALL, quiet=True)
    monkeypatch.setattr(faiss, "serialize_index", None)
    faiss_index.write_faiss(index._index, tmp_path / "x.faiss")
    assert faiss_index.read_faiss(tmp_path / "x.faiss").ntotal == len(STORE)


def test_an_index_of_other_keys_is_noticed(tmp_path):
    build_index(STORE, SMALL, directory=tmp_path, store_fingerprint="", quiet=True)
    other = MemoryStore(normal(12_000, 8, seed=77, dtype=torch.float16), shard=5000)
    load_index(tmp_path, STORE, store_fingerprint="")
    with pytest.warns(UserWarning, match="keys of the store should find themselves"):
        load_index(tmp_path, other, store_fingerprint="")
