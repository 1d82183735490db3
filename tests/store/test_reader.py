"""Reading: gathers equal indexing, blocks cover everything once, keys stay on disk until asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.store import reader as module
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore
from store.making import DIM, ROWS, build, entries


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return build(tmp_path_factory.mktemp("reader") / "store").finalize()


@pytest.fixture(scope="module")
def whole():
    return [
        torch.cat(column) for column in zip(*(entries(n) for n in range(len(ROWS))), strict=True)
    ]


several = settings(max_examples=60, deadline=None)


@several
@given(ids=st.lists(st.integers(0, sum(ROWS) - 1), max_size=30), columns=st.sampled_from([1, 2, 3]))
def test_gather_is_indexing(ids, columns, store, whole):
    ids = torch.tensor(ids[: len(ids) // columns * columns], dtype=torch.int64).reshape(-1, columns)
    found = store.gather(ids)
    assert found.shape == (*ids.shape, DIM)
    assert torch.equal(found, whole[0][ids])


@several
@given(rows=st.integers(1, 20))
def test_blocks_cover_the_keys_once_and_in_order(rows, store, whole):
    blocks = list(store.blocks(rows))
    assert all(1 <= len(keys) <= rows for _, keys in blocks)
    place = 0
    for start, keys in blocks:
        assert start == place
        assert torch.equal(keys, whole[0][start : start + len(keys)])
        place += len(keys)
    assert place == len(store) == sum(ROWS)


def test_columns_and_descriptions(store, whole):
    assert store.values.dtype == torch.int32
    assert store.values.tolist() == whole[1].tolist()
    assert store.documents.tolist() == whole[2].tolist()
    assert store.positions.tolist() == whole[3].tolist()
    assert torch.equal(store.load_keys(), whole[0])
    assert store.load_keys(dtype=torch.float64).dtype == torch.float64
    assert (store.dim, store.dtype, store.metric) == (DIM, torch.float32, "l2")
    assert store.describe()["entries"] == sum(ROWS)
    assert store.describe()["fingerprint"] == Datastore.open(store.path).fingerprint
    assert "13" in repr(store)


@pytest.mark.parametrize("shard_rows", [4, 100])
def test_bfloat16_keys_come_back_bit_for_bit(shard_rows, tmp_path):
    keys = torch.randn(11, 3, dtype=torch.bfloat16)
    store = save_arrays(tmp_path, keys, torch.arange(11), shard_rows=shard_rows)
    ids = torch.tensor([[10, 0], [3, 4], [4, 4]])
    assert store.gather(ids).dtype == torch.bfloat16
    assert torch.equal(store.gather(ids), keys[ids])
    scalar = store.gather(torch.tensor(7))
    assert torch.equal(scalar, keys[7])


def test_only_the_keys_asked_for_are_opened(tmp_path, monkeypatch):
    keys = torch.randn(12, 3)
    save_arrays(tmp_path, keys, torch.arange(12), shard_rows=4)
    opened = []
    read = module.read_tensor
    monkeypatch.setattr(
        module, "read_tensor", lambda path, *rest: opened.append(path.name) or read(path, *rest)
    )
    store = Datastore.open(tmp_path)
    assert opened == []
    assert store.values[5] == 5
    assert all(name.startswith("values") for name in opened)
    opened.clear()
    store.gather(torch.tensor([9, 8]))
    store.gather(torch.tensor([10]))
    assert opened == ["keys-00002.safetensors"]


def test_keys_are_memory_mapped(tmp_path):
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    try:
        resident()
    except OSError:
        return  # only Linux tells
    rows, dim = 1 << 18, 64
    save_arrays(tmp_path, torch.ones(rows, dim), torch.zeros(rows, dtype=torch.int32))
    store = Datastore.open(tmp_path)
    before = resident()
    assert store.gather(torch.tensor([5, rows - 1])).sum() == 2 * dim
    assert resident() - before < rows * dim * 4 / 4


@pytest.mark.parametrize(("ids", "named"), [([0, -1], -1), ([13, 2], 13)])
def test_ids_outside_the_store_are_named(ids, named, store):
    with pytest.raises(InputError, match=f"between 0 and 12, got {named}"):
        store.gather(torch.tensor(ids))


def test_a_block_has_a_row(store):
    with pytest.raises(InputError, match="at least 1 row, got 0"):
        store.blocks(0)


def test_an_unfinished_store_is_not_read(tmp_path):
    build(tmp_path / "store", [0])
    with pytest.raises(StoreError, match="still being built"):
        Datastore.open(tmp_path / "store")


@pytest.mark.parametrize("kind", ["keys", "values", "documents"])
def test_a_missing_or_truncated_file_is_named(kind, tmp_path):
    build(tmp_path / "store").finalize()
    file = tmp_path / "store" / f"{kind}-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptStoreError, match=rf"{file.name} must have \d+ bytes but has \d+"):
        Datastore.open(tmp_path / "store")
    file.unlink()
    with pytest.raises(CorruptStoreError, match=f"{file.name} must exist"):
        Datastore.open(tmp_path / "store")


def test_a_file_of_another_kind_is_named(tmp_path):
    build(tmp_path / "store").finalize()
    file = tmp_path / "store" / "keys-00000.safetensors"
    data = file.read_bytes()
    store = Datastore.open(tmp_path / "store")
    file.write_bytes(data.replace(b"[5,4]", b"[4,5]"))
    with pytest.raises(CorruptStoreError, match=r"of shape \(5, 4\), got .*\(4, 5\)"):
        store.gather(torch.tensor([0]))
    file.write_bytes(b"\xff" * len(data))
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        store.gather(torch.tensor([0]))


def test_leftovers_of_writers_are_not_read(tmp_path):
    store = build(tmp_path / "store").finalize()
    (tmp_path / "store" / "keys-00000.safetensors.77.tmp").write_bytes(b"x")
    assert Datastore.open(tmp_path / "store").fingerprint == store.fingerprint
