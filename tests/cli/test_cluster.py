"""`memlm cluster`, called as the verb it is."""

import json

import pytest
import torch

from memlm.cli.cluster import Cluster
from memlm.index.partition import Clusters
from memlm.store.arrays import save_arrays


@pytest.fixture
def store(tmp_path):
    keys = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    return save_arrays(tmp_path / "store", keys, torch.arange(500))


def test_it_clusters_and_says_so(store, capsys):
    verb = Cluster(store=str(store.path), clusters=7, json=True)
    assert verb.run() == 0
    described = json.loads(capsys.readouterr().out)
    made = Clusters.load(store.path / "automaton", store_fingerprint=store.fingerprint)
    assert described == made.describe()
    assert described["clusters"] == 7
    assert Cluster(store=str(store.path), clusters=7).run() == 0
    out = capsys.readouterr().out
    assert "7 clusters of 500 keys of 6 dimensions" in out
    assert "states, the largest of" in out


def test_it_plans_without_doing(store, capsys):
    assert Cluster(store=str(store.path), clusters=99, plan=True).run() == 0
    assert "using 5 clusters" not in capsys.readouterr().err
    assert not (store.path / "automaton").exists()
    assert Cluster(store=str(store.path), plan=True, json=True).run() == 0
    assert json.loads(capsys.readouterr().out)["clusters"] == 5
