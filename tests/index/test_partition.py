"""Partitions: two views of one thing, on disk and back, and what they refuse."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.index.partition import Clusters, has_clusters

CLUSTER_OF = torch.tensor([2, 0, -1, 2, 4, 0, 0])


@given(st.lists(st.integers(-1, 5)), st.integers(0, 3))
def test_both_views_agree(cluster_of, more):
    count = max(cluster_of, default=-1) + 1 + more
    got = Clusters.from_assignment(torch.tensor(cluster_of, dtype=torch.int64), count)
    assert len(got) == count
    assert got.cluster_of.tolist() == cluster_of
    assert (got.offsets.dtype, got.members.dtype) == (torch.int64, torch.int32)
    for cluster in range(count):
        begin, end = got.offsets[cluster : cluster + 2].tolist()
        expected = [entry for entry, c in enumerate(cluster_of) if c == cluster]
        assert got.members[begin:end].tolist() == expected
    assert len(got.members) == sum(c >= 0 for c in cluster_of)
    alone = sum(c < 0 for c in cluster_of)
    assert got.states == len({c for c in cluster_of if c >= 0}) + alone
    again = Clusters.from_members(got.offsets, got.members, len(cluster_of))
    assert again.cluster_of.tolist() == cluster_of


def test_members_in_any_order_become_ascending():
    got = Clusters.from_members([0, 3, 3, 4], [5, 1, 3, 0], 7)
    assert got.members.tolist() == [1, 3, 5, 0]
    assert got.cluster_of.tolist() == [2, 0, -1, 0, -1, 0, -1]
    assert got.states == 5


@pytest.mark.parametrize(
    ("offsets", "members", "message"),
    [
        ([0, 2], [1], "offsets must rise from 0 to the 1 members"),
        ([1, 2], [1, 2], "offsets must rise"),
        ([0, 2, 1, 3], [1, 2, 3], "offsets must rise"),
        ([], [], "offsets must rise"),
        ([0, 1], [7], "members must be entries of the store, 0 to 6, got 7 to 7"),
        ([0, 1], [-1], "members must be entries"),
        ([0, 1, 2], [3, 3], "one cluster at most"),
    ],
)
def test_what_is_no_partition_is_refused(offsets, members, message):
    with pytest.raises(InputError, match=message):
        Clusters.from_members(offsets, members, 7)


def test_assignments_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"between -1 \(none\) and 3, got -1 to 4"):
        Clusters.from_assignment(CLUSTER_OF, 4)
    with pytest.raises(InputError, match="between -1"):
        Clusters.from_assignment(torch.tensor([0, -2]))
    with pytest.raises(InputError, match="integers"):
        Clusters.from_assignment(torch.tensor([0.0]))


@pytest.fixture
def saved(tmp_path):
    Clusters.from_assignment(CLUSTER_OF, 6, store_fingerprint="mine", faiss="1").save(
        tmp_path / "a"
    )
    return tmp_path / "a"


def test_saved_and_loaded(saved):
    assert has_clusters(saved)
    assert not has_clusters(saved / "elsewhere")
    got = Clusters.load(saved, store_fingerprint="mine")
    expected = Clusters.from_assignment(CLUSTER_OF, 6)
    for name in ("offsets", "members", "cluster_of"):
        assert_close(getattr(got, name), getattr(expected, name), atol=0, rtol=0)
    assert (got.record.largest, got.record.empty, got.record.entries) == (3, 3, 7)
    assert got.describe() | {"faiss": "1"} == got.describe()
    assert sorted(path.name for path in saved.iterdir()) == [
        "automaton.json",
        "clusters.safetensors",
    ]


def test_another_store_is_refused(saved):
    with pytest.raises(FingerprintError, match="made of store mine but are used with store other"):
        Clusters.load(saved, store_fingerprint="other")
    with pytest.raises(InputError, match="cover the store's 8 entries, got 7"):
        Clusters.load(saved).check_store(8, "mine")


def test_damage_is_found(saved):
    file, record = saved / "clusters.safetensors", saved / "automaton.json"
    whole, text = file.read_bytes(), record.read_text()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptStoreError, match="must have checksum"):
        Clusters.load(saved)
    file.unlink()
    with pytest.raises(CorruptStoreError, match="no file"):
        Clusters.load(saved)
    file.write_bytes(whole)
    for changes in ({"clusters": 5}, {"entries": 9}):
        record.write_text(json.dumps({**json.loads(text), **changes}))
        with pytest.raises(CorruptStoreError, match="clusters of"):
            Clusters.load(saved)
    record.write_text(json.dumps({**json.loads(text), "surprise": 1}))
    with pytest.raises(CorruptStoreError, match="must describe clusters"):
        Clusters.load(saved)
    record.write_text("{")
    with pytest.raises(CorruptStoreError, match="does not parse"):
        Clusters.load(saved)
    record.unlink()
    with pytest.raises(CorruptStoreError, match="must exist"):
        Clusters.load(saved)
