"""Stores that the published programs wrote, imported as they lie there."""

import json

import numpy as np
import torch
from conftest import sibling

from memlm.importers.datastore import export_datastore, import_datastore
from memlm.index.build import load_index
from memlm.index.partition import Clusters
from memlm.store.verify import verify


def raw(file, dtype):
    return np.fromfile(file, dtype)


def test_a_store_of_knn_transformers(golden_retomaton_dstore_gpt2, tmp_path):
    folder = golden_retomaton_dstore_gpt2
    meta = json.loads((folder / "meta.json").read_text())
    store = import_datastore(
        folder,
        tmp_path / "store",
        index=next(folder.glob("index_*.indexed"), None),
        members=next(sibling(folder, "kmeans_members").glob("members_*.pkl"), None),
    )
    keys = raw(next(folder.glob("*_keys.npy")), np.float16).reshape(meta["n"], meta["dim"])
    np.testing.assert_array_equal(store.load_keys().numpy(), keys)
    values = raw(next(folder.glob("*_vals.npy")), np.int32)
    np.testing.assert_array_equal(store.values.numpy(), values)
    assert verify(store.path, "full").ok
    searched = np.load(folder / "ivfpq_search.npz")
    found = load_index(store.path / "index", store, nprobe=meta["probe"]).search(
        torch.from_numpy(searched["queries"]), searched["ids"].shape[1]
    )
    np.testing.assert_allclose(-found.scores.numpy(), searched["dist"], atol=1e-4)
    clusters = Clusters.load(store.path / "automaton", store_fingerprint=store.fingerprint)
    assert len(clusters) == meta["nclus"]
    export_datastore(store, tmp_path / "back", value_bytes=4)
    assert (tmp_path / "back_keys.npy").read_bytes() == keys.tobytes()
    assert (tmp_path / "back_vals.npy").read_bytes() == values.tobytes()


def test_a_store_of_fairseq(golden_retomaton_fairseq_lm, tmp_path):
    folder = golden_retomaton_fairseq_lm
    members = np.load(folder / "members.npz")
    store = import_datastore(
        folder,
        tmp_path / "store",
        index=next(folder.glob("*.index")),
        members=next(folder.glob("*_members.pkl")),
    )
    values = raw(next(folder.glob("*_vals.npy")), np.int64)
    np.testing.assert_array_equal(store.values.numpy(), values)
    keys = raw(next(folder.glob("*_keys.npy")), np.float16)
    np.testing.assert_array_equal(store.load_keys().numpy().reshape(-1), keys)
    clusters = Clusters.load(store.path / "automaton", store_fingerprint=store.fingerprint)
    np.testing.assert_array_equal(clusters.cluster_of[members["col"]], members["row"])
    export_datastore(store, tmp_path / "back")
    assert (tmp_path / "back_vals.npy").read_bytes() == values.tobytes()
