"""Clustering against the original: `run_clm.py --cluster_dstore` and its pickled members."""

import json

import numpy as np
import pytest
import torch
from conftest import sibling

from memlm.formats.members import read_members
from memlm.index.cluster import assign, train_centroids
from memlm.index.exact import ExactIndex
from memlm.index.partition import Clusters


class Golden:
    """The files of one case folder."""

    def __init__(self, folder):
        arrays = np.load(folder / "kmeans.npz")
        self.cluster_of, self.centroids = arrays["cluster_of"], arrays["centroids"]
        self.rows, self.columns = arrays["members_row"], arrays["members_col"]
        self.pickled = read_members(next(folder.glob("members_*.pkl")))
        built = sibling(folder, "dstore_gpt2")
        self.meta = json.loads((built / "meta.json").read_text())
        keys = np.fromfile(next(built.glob("*_keys.npy")), np.float16)
        self.keys = torch.from_numpy(keys.reshape(self.meta["n"], self.meta["dim"]))


@pytest.fixture
def golden(golden_retomaton_kmeans_members):
    return Golden(golden_retomaton_kmeans_members)


def test_every_key_goes_to_the_same_cluster(golden):
    got = assign(golden.keys, ExactIndex(torch.from_numpy(golden.centroids)))
    np.testing.assert_array_equal(got.numpy(), golden.cluster_of)


def test_members_are_those_of_the_pickle(golden):
    expected = Clusters.from_assignment(torch.from_numpy(golden.cluster_of), golden.meta["nclus"])
    np.testing.assert_array_equal(golden.pickled.offsets, expected.offsets.numpy())
    np.testing.assert_array_equal(golden.pickled.members, expected.members.numpy())
    rows = np.repeat(np.arange(len(expected)), expected.offsets.diff().numpy())
    np.testing.assert_array_equal(rows, golden.rows)
    np.testing.assert_array_equal(golden.pickled.members, golden.columns)


def test_clusters_of_the_pickle(golden):
    offsets, members, entries = golden.pickled
    assert entries == golden.meta["n"]
    got = Clusters.from_members(offsets, members, golden.meta["n"])
    np.testing.assert_array_equal(got.cluster_of.numpy(), golden.cluster_of)


def test_centroids_from_the_original_sample(golden):
    ids = np.random.RandomState(1).choice(
        np.arange(golden.meta["n"]), golden.meta["sample"], replace=False
    )
    got = train_centroids(golden.keys[ids].float().numpy(), golden.meta["nclus"])
    torch.testing.assert_close(got, torch.from_numpy(golden.centroids), atol=1e-3, rtol=0)
