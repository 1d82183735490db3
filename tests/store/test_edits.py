"""Deleting, compacting, pruning and joining."""

import json

import pytest
import torch

from memlm.core.errors import CorruptStoreError, FingerprintError, InputError, StoreError
from memlm.store.arrays import save_arrays
from memlm.store.deleted import delete_documents
from memlm.store.reader import DELETED, Datastore
from memlm.store.rewrite import compact_store, join_stores, prune
from memlm.store.verify import verify
from store.making import DIM, VOCAB, build

LENGTHS = (4, 3, 5)


def make(path, *, seed=0, documents=True, **changes) -> Datastore:
    entries = sum(LENGTHS)
    draw = torch.Generator().manual_seed(seed)
    places = {
        "documents": torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)),
        "positions": torch.cat([torch.arange(1, length + 1) for length in LENGTHS]),
    }
    return save_arrays(
        path,
        torch.randn(entries, DIM, generator=draw),
        torch.randint(0, VOCAB, (entries,), generator=draw),
        **(places if documents else {}),
        **{"model_hash": "m", "tap": "final", "shard_rows": 5, **changes},
    )


def same(one: Datastore, other: Datastore, entries: torch.Tensor):
    """``one`` holds the ``entries`` of ``other``."""
    assert torch.equal(one.load_keys(), other.load_keys()[entries])
    assert torch.equal(one.values, other.values[entries])
    assert torch.equal(one.documents, other.documents[entries])
    assert torch.equal(one.positions, other.positions[entries])


class TestDelete:
    def test_its_entries_are_dead(self, tmp_path):
        store = make(tmp_path / "s")
        fingerprint = store.fingerprint
        assert store.dead is None
        store = delete_documents(store, [1])
        assert store.dead.tolist() == [False] * 4 + [True] * 3 + [False] * 5
        store = delete_documents(store, [1, 2])
        assert store.deleted == (1, 2)
        assert Datastore.open(store.path).dead.sum() == 8
        assert store.fingerprint == fingerprint
        assert store.describe()["deleted_documents"] == 2
        assert verify(store.path, "full").ok

    def test_what_another_process_deleted_stays_deleted(self, tmp_path):
        first, second = make(tmp_path / "s"), Datastore.open(tmp_path / "s")
        delete_documents(first, [0])
        assert delete_documents(second, [2]).deleted == (0, 2)

    def test_bad_documents(self, tmp_path):
        store = make(tmp_path / "s")
        with pytest.raises(InputError, match=r"\[7\] are not; it has 3 documents, numbered from 0"):
            delete_documents(store, [7])
        with pytest.raises(InputError, match="at least one of the store's 3 documents must be"):
            delete_documents(store, range(3))
        with pytest.raises(InputError, match="must know the document of every entry"):
            delete_documents(make(tmp_path / "t", documents=False), [0])

    def test_a_damaged_list(self, tmp_path):
        make(tmp_path / "s")
        (tmp_path / "s" / DELETED).write_text(json.dumps({"documents": "all"}))
        with pytest.raises(CorruptStoreError, match="must list the deleted documents"):
            Datastore.open(tmp_path / "s")


class TestCompact:
    def test_the_rest_in_order(self, tmp_path):
        store = delete_documents(make(tmp_path / "s"), [1])
        small = compact_store(store, tmp_path / "small")
        same(small, store, (~store.dead).nonzero().squeeze(-1))
        assert small.dead is None
        assert small.successors.tolist() == [1, 2, 3, -1, 5, 6, 7, 8, -1]

    def test_nothing_deleted(self, tmp_path):
        with pytest.raises(InputError, match="must have deleted documents to be compacted"):
            compact_store(make(tmp_path / "s"), tmp_path / "small")

    def test_there_is_something_already(self, tmp_path):
        store = delete_documents(make(tmp_path / "s"), [1])
        make(tmp_path / "t", seed=1)
        with pytest.raises((StoreError, FingerprintError)):
            compact_store(store, tmp_path / "t")


class TestPrune:
    def test_survivors_keep_their_place_in_the_text(self, tmp_path):
        store = make(tmp_path / "s")
        parent = torch.arange(12)
        parent[1], parent[6], parent[8] = 5, 5, 0  # the follower of 0 is now 5, that of 7 is 0
        weights = torch.bincount(parent, minlength=12)
        small = prune(store, parent, weights, tmp_path / "small")
        kept = weights.nonzero().squeeze(-1)
        same(small, store, kept)
        assert small.weights.tolist() == weights[kept].tolist()
        followers = kept[small.successors.long()].where(small.successors >= 0, torch.tensor(-1))
        assert kept.tolist() == [0, 2, 3, 4, 5, 7, 9, 10, 11]
        assert followers.tolist() == [5, 3, -1, 5, 5, 0, 10, 11, -1]
        assert verify(small.path, "full").ok

    def test_a_pruned_store_can_lose_documents(self, tmp_path):
        store = make(tmp_path / "s")
        parent = torch.arange(12)
        parent[1] = 5
        small = prune(store, parent, torch.bincount(parent, minlength=12), tmp_path / "small")
        smaller = compact_store(delete_documents(small, [0]), tmp_path / "smaller")
        assert smaller.weights.tolist() == [1, 2, 1, 1, 1, 1, 1, 1]
        assert smaller.successors.tolist() == [1, 2, -1, 4, 5, 6, 7, -1]
        assert Datastore.open(smaller.path).successors.tolist() == smaller.successors.tolist()

    def test_merges_that_do_not_fit(self, tmp_path):
        store = make(tmp_path / "s")
        ones = torch.ones(12, dtype=torch.long)
        with pytest.raises(InputError, match="must account for the store's 12 entries"):
            prune(store, torch.arange(12), 2 * ones, tmp_path / "small")
        gone = delete_documents(store, [1])
        with pytest.raises(InputError, match="must be a full store without deleted documents"):
            prune(gone, torch.arange(12), ones, tmp_path / "small")


class TestJoin:
    def test_one_after_the_other(self, tmp_path):
        one, two = make(tmp_path / "one"), delete_documents(make(tmp_path / "two", seed=5), [2])
        whole = join_stores([one, two, one], tmp_path / "whole")
        assert torch.equal(
            whole.load_keys(), torch.cat([store.load_keys() for store in (one, two, one)])
        )
        assert torch.equal(whole.values, torch.cat([one.values, two.values, one.values]))
        assert whole.documents.unique().tolist() == list(range(9))
        assert whole.deleted == (5,)
        assert whole.successors[11] == -1
        assert whole.manifest.identity.model_hash == "m"

    def test_made_differently(self, tmp_path):
        one, two = make(tmp_path / "one"), make(tmp_path / "two", model_hash="other")
        with pytest.raises(FingerprintError, match=r"model_hash is 'm' in .* and 'other' in"):
            join_stores([one, two], tmp_path / "whole")

    def test_too_few(self, tmp_path):
        with pytest.raises(InputError, match="at least two stores must be given to join, got 1"):
            join_stores([make(tmp_path / "one")], tmp_path / "whole")


def test_a_built_store_can_be_joined_to_itself(tmp_path):
    store = build(tmp_path / "s").finalize()
    assert len(join_stores([store, store], tmp_path / "twice")) == 2 * len(store)
