"""`memlm delete`, `compact`, `prune` and `join`, called as verbs."""

import json

import pytest
import torch

from memlm.cli.main import main
from memlm.index.build import build_index, load_index
from memlm.index.plan import IndexConfig
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore


@pytest.fixture
def store(tmp_path):
    draw = torch.Generator().manual_seed(0)
    return save_arrays(
        tmp_path / "store",
        torch.randn(300, 6, generator=draw),
        torch.randint(0, 3, (300,), generator=draw),
        documents=torch.arange(300) // 30,
        positions=torch.arange(300) % 30,
    )


def run(capsys, *arguments):
    assert main([*(str(argument) for argument in arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_delete_and_compact(store, tmp_path, capsys):
    assert run(capsys, "delete", store.path, 3, 5)["dead"] == 60
    made = run(capsys, "compact", store.path, "--out", tmp_path / "small")
    assert made["entries"] == len(Datastore.open(tmp_path / "small")) == 240
    assert main(["delete", str(store.path), "99"]) == 2
    assert "[99] are not" in capsys.readouterr().err


def test_prune(store, tmp_path, capsys):
    made = run(capsys, "prune", store.path, "--out", tmp_path / "small", "--neighbours", 4)
    small = Datastore.open(tmp_path / "small")
    assert made["entries"] == len(small) < 300
    assert int(small.weights.sum()) == 300
    assert main(["prune", str(small.path), "--out", str(tmp_path / "smaller")]) == 2
    assert "must be a full store" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_join_carries_the_index_on(store, tmp_path, capsys):
    config = IndexConfig(factory="IVF4,Flat", nprobe=4, train_size=300)
    build_index(store, config, directory=store.path / "index", quiet=True)
    made = run(capsys, "join", store.path, store.path, "--out", tmp_path / "twice")
    assert made["entries"] == 600
    twice = Datastore.open(tmp_path / "twice")
    assert len(load_index(twice.path / "index", twice)) == 600
