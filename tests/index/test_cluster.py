"""Clustering: every key at its nearest centroid, whoever dies on the way."""

import os
import shutil
import warnings

import faiss
import pytest
import torch
from torch.testing import assert_close

import memlm.index.cluster as room
from index.stores import MemoryStore, normal
from memlm.core.errors import InputError, StoreError
from memlm.index.cluster import ClusterConfig, assign, cluster_store, plan_clusters
from memlm.index.exact import ExactIndex
from memlm.index.partition import Clusters, has_clusters

CONFIG = ClusterConfig(clusters=5)


def groups(count=600, dim=6, kinds=5, metric="l2", seed=0):
    """Keys in well separated groups, and the group of each."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, kinds, (count,), generator=generator)
    keys = 8 * normal(kinds, dim, seed=seed)[kind] + normal(count, dim, seed=seed + 1)
    return MemoryStore(keys, metric=metric, shard=170), kind


class OnDisk(MemoryStore):
    def __init__(self, path, store):
        super().__init__(store.keys, store.values, store.metric, store.shard)
        self.path = path


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_BLOCK_ROWS", 64)
    return OnDisk(tmp_path / "store", groups()[0])


def cluster(store, config=CONFIG, **options):
    return cluster_store(store, config, quiet=True, **options)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(a, b):
    for name in ("offsets", "members", "cluster_of"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_groups_are_found():
    keys, kind = groups(kinds=2)
    got = cluster(keys, ClusterConfig(clusters=2)).cluster_of
    pairs = set(zip(kind.tolist(), got.tolist(), strict=True))
    assert len(pairs) == 2


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_every_key_is_at_its_nearest_centroid(metric, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        room._Pieces, "keep", lambda self, name, piece: kept.setdefault(name, piece)
    )
    keys = MemoryStore(normal(700, 6), metric=metric)
    got = cluster(keys, ClusterConfig(clusters=12, seed=3))
    points, centroids = keys.keys.double(), kept["centroids"].double()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points)
        assert_close(centroids.norm(dim=1), torch.ones(12, dtype=torch.float64))
    distances = torch.cdist(points, centroids)
    mine = distances.gather(1, got.cluster_of.long().unsqueeze(1)).squeeze(1)
    assert_close(mine, distances.min(1).values, atol=1e-5, rtol=0)
    # Lloyd's iterations have come to rest, or nearly: centroids are means of their members
    if metric == "l2":
        means = torch.stack([points[got.cluster_of == c].mean(0) for c in range(12)])
        assert (means - centroids).norm(dim=1).mean() < 0.3


def test_ties_go_to_the_lower_cluster():
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    got = assign(torch.tensor([[0.0, 3.0], [2.0, 1.0], [-2.0, 0.0]]), ExactIndex(centroids))
    assert got.tolist() == [0, 0, 1]
    assert got.dtype == torch.int32


def test_a_partition_of_all_entries(store):
    got = cluster(store)
    assert sorted(got.members.tolist()) == list(range(600))
    same(got, Clusters.load(store.path / "automaton", store_fingerprint=store.fingerprint))
    assert got.record.entries == 600
    assert sorted(content(store.path / "automaton")) == ["automaton.json", "clusters.safetensors"]


def test_bytes_do_not_depend_on_blocks_in_memory_or_disk(store, tmp_path):
    cluster(store)
    same(cluster(MemoryStore(store.keys)), Clusters.load(store.path / "automaton"))
    cluster(store, directory=tmp_path / "twin")
    assert content(tmp_path / "twin") == content(store.path / "automaton")


def test_finished_clusters_are_loaded_and_other_settings_replace_them(store, monkeypatch):
    first = cluster(store)

    def never(*_, **__):
        raise AssertionError("nothing has to be trained again")

    with monkeypatch.context() as patch:
        patch.setattr(room, "train_centroids", never)
        same(cluster(store), first)
    second = cluster(store, ClusterConfig(clusters=7))
    assert len(second) == 7
    assert len(Clusters.load(store.path / "automaton")) == 7


class DeathError(Exception):
    pass


def test_a_run_that_dies_goes_on_where_it_was(store, tmp_path, monkeypatch):
    twin = tmp_path / "whole"
    cluster(store, directory=twin)
    expected, folder = content(twin), store.path / "automaton"
    names, trained = [], []
    keep, train = room._Pieces.keep, room.train_centroids

    def dying(self, name, piece):
        if name in names:
            raise AssertionError(f"{name} was done before")
        if len(names) == step:
            raise DeathError
        keep(self, name, piece)
        names.append(name)

    monkeypatch.setattr(room._Pieces, "keep", dying)
    monkeypatch.setattr(
        room, "train_centroids", lambda *a, **k: trained.append(1) or train(*a, **k)
    )
    step = 0
    while True:
        try:
            cluster(store)
            break
        except DeathError:
            assert not has_clusters(folder)
            step += 1
    assert step == len(names) == 1 + 4 * 3 - 1  # centroids, and blocks of 64 in shards of 170
    assert len(trained) == 2
    assert content(folder) == expected


@pytest.mark.parametrize("damage", ["gone", "flipped"])
@pytest.mark.parametrize("piece", ["centroids", "assigned-000000000064"])
def test_damaged_pieces_are_made_again(store, tmp_path, monkeypatch, damage, piece):
    cluster(store, directory=tmp_path / "whole")
    monkeypatch.setattr(Clusters, "save", lambda *_: (_ for _ in ()).throw(DeathError))
    with pytest.raises(DeathError):
        cluster(store)
    monkeypatch.undo()
    monkeypatch.setattr(room, "_BLOCK_ROWS", 64)
    file = store.path / "automaton" / "building" / f"{piece}.safetensors"
    data = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    cluster(store)
    assert content(store.path / "automaton") == content(tmp_path / "whole")


def test_pieces_of_another_build_are_not_used(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Clusters, "save", lambda *_: (_ for _ in ()).throw(DeathError))
        with pytest.raises(DeathError):
            cluster(store, ClusterConfig(clusters=4))
    cluster(store)
    cluster(store, directory=tmp_path / "whole")
    assert content(store.path / "automaton") == content(tmp_path / "whole")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_every_failure_of_the_disk_leaves_a_build_that_can_go_on(store, tmp_path, name):
    cluster(store, directory=tmp_path / "whole")
    real, count = getattr(os, name), 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            calls = iter(range(10_000))

            def failing(*arguments, calls=calls, limit=count):
                if next(calls) == limit:
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            patch.setattr(os, name, failing)
            try:
                cluster(store)
                break
            except StoreError:
                pass
        cluster(store)
        assert content(store.path / "automaton") == content(tmp_path / "whole")
        shutil.rmtree(store.path / "automaton")
        count += 7 if count > 14 else 1
    assert count > 5


def test_a_folder_that_cannot_be_written(store):
    store.path.parent.mkdir(exist_ok=True)
    store.path.write_text("a file is in the way")
    with pytest.raises(StoreError, match="must be a directory that can be written"):
        cluster(store)


def test_the_plan():
    assert plan_clusters(100_000, 8, ClusterConfig())[:2] == (1000, 40_000)
    assert plan_clusters(100_000, 8, ClusterConfig(sample=90_000)).sample == 90_000
    assert plan_clusters(50, 8, ClusterConfig())[:2] == (1, 40)
    plan = plan_clusters(1000, 8, ClusterConfig(clusters=100))
    assert plan[:2] == (25, 1000)
    assert "100 clusters need 3,900 keys" in plan.warnings[0]
    assert plan_clusters(10, 8, ClusterConfig(clusters=3)).clusters == 1
    with pytest.raises(InputError, match="at least one key"):
        plan_clusters(0, 8, ClusterConfig())


def test_the_plan_states_the_cost(store):
    plan = plan_clusters(600, 6, ClusterConfig(clusters=2, sample=600, iterations=3))
    assert plan.operations == (3 * 512 + 600) * 2 * 6  # k-means takes 256 keys per cluster
    assert plan.text.startswith("2 clusters of 600 keys of 6 dimensions, trained on 512 keys")
    cluster(store, ClusterConfig(clusters=2))
    size = (store.path / "automaton" / "clusters.safetensors").stat().st_size
    assert plan.bytes == pytest.approx(size, abs=400)  # the header


def test_too_few_keys_warn_and_faiss_keeps_quiet(capfd):
    with pytest.warns(UserWarning, match="using 15 clusters"):
        got = cluster(groups()[0], ClusterConfig(clusters=60))
    assert len(got) == 15
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(cluster(groups(30)[0], ClusterConfig(clusters=1))) == 1
    assert capfd.readouterr() == ("", "")


def test_threads_are_given_back(store):
    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    cluster(store, threads=1)
    assert (faiss.omp_get_max_threads(), torch.get_num_threads()) == before
    with pytest.raises(InputError, match="threads must be at least 1"):
        cluster(store, threads=0)


@pytest.mark.parametrize("name", ["clusters", "sample", "iterations"])
def test_settings_are_checked(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        ClusterConfig(**{name: 0})
    with pytest.raises(InputError, match="at least one key"):
        cluster(MemoryStore(torch.empty(0, 3)))
