"""Imports that warn or refuse."""

import faiss
import numpy as np
import pytest
import torch

from memlm.core.errors import InputError
from memlm.importers.datastore import export_datastore, import_datastore
from memlm.memory.knn import KnnMemory
from memlm.store.reader import Datastore


def write(folder, entries=6, dim=4, weights=None):
    draw = np.random.default_rng(0)
    keys = draw.normal(size=(entries, dim)).astype("float16")
    values = draw.integers(1, 50, entries)
    keys.tofile(folder / f"dstore_{entries}_{dim}_keys.npy")
    values.tofile(folder / f"dstore_{entries}_{dim}_vals.npy")
    if weights is not None:
        weights.tofile(folder / f"dstore_{entries}_{dim}_weights.npy")
    return keys, values


def index_of(keys, path):
    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys.astype("float32"))
    faiss.write_index(index, str(path))
    return path


def test_the_index_comes_along(tmp_path):
    keys, values = write(tmp_path)
    index = index_of(keys, tmp_path / "flat.index")
    store = import_datastore(tmp_path, tmp_path / "store", index=index, model="gpt2")
    memory = KnnMemory(Datastore.open(store.path), k=1)
    answer, _ = memory.read(torch.from_numpy(keys).float())
    assert answer.tokens[:, 0].tolist() == values.tolist()
    assert memory.describe()["index"]["engine"] == "faiss"


def test_an_index_of_another_store(tmp_path):
    keys, _ = write(tmp_path)
    index = index_of(keys[1:], tmp_path / "flat.index")
    with pytest.raises(InputError, match="entries 5, dim 4 explains"):
        import_datastore(tmp_path, tmp_path / "store", index=index, dim=4)
    with pytest.raises(InputError, match=r"of the store's 6 keys of 4 dimensions, got 5 of 4"):
        import_datastore(tmp_path, tmp_path / "store", index=index, entries=6)


def test_rows_that_nobody_filled_are_left_out(tmp_path):
    write(tmp_path, entries=4)
    for kind, width in (("keys", 8), ("vals", 8)):
        old = tmp_path / f"dstore_4_4_{kind}.npy"
        (tmp_path / f"dstore_6_4_{kind}.npy").write_bytes(old.read_bytes() + bytes(2 * width))
        old.unlink()
    with pytest.warns(UserWarning, match="the last 2 of 6 entries were never written"):
        store = import_datastore(tmp_path, tmp_path / "store")
    assert len(store) == 4


def test_nothing_but_zeros(tmp_path):
    np.zeros((3, 4), "float16").tofile(tmp_path / "dstore_3_4_keys.npy")
    np.zeros(3, "int64").tofile(tmp_path / "dstore_3_4_vals.npy")
    with pytest.raises(InputError, match="must hold entries, but all 3 are zero"):
        import_datastore(tmp_path, tmp_path / "store")


def test_a_merged_store_keeps_its_weights(tmp_path):
    write(tmp_path, weights=np.arange(1, 7))
    store = import_datastore(tmp_path, tmp_path / "store")
    assert store.weights.tolist() == list(range(1, 7))
    assert store.successors.tolist() == [-1] * 6


def test_export_of_an_unknown_width(tmp_path):
    write(tmp_path)
    store = import_datastore(tmp_path, tmp_path / "store")
    with pytest.raises(InputError, match="value_bytes must be 4 or 8, got 2"):
        export_datastore(store, tmp_path / "back", value_bytes=2)
