"""Reading checkpoints: every container, both kinds of settings, and nothing of them is run."""

import argparse
import os
import sys
import types

import numpy as np
import pytest
import torch

from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.checkpoints import read_checkpoint

TENSORS = {"decoder.one": torch.arange(6.0).view(2, 3), "decoder.half": torch.ones(2).half()}


def save(path, *, zipped=True, **state):
    torch.save({"model": TENSORS, **state}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_args_and_tensors_in_both_containers(tmp_path, zipped):
    path = save(
        tmp_path / "model.pt",
        zipped=zipped,
        args=argparse.Namespace(decoder_layers=2, adaptive_input=True),
        extra_state={"val_loss": np.float64(3.5), "epoch": 2, "order": np.arange(3)},
        optimizer_history=[{"num_updates": 7}],
    )
    got = read_checkpoint(path)
    assert got.settings == {"decoder_layers": 2, "adaptive_input": True}
    assert set(got.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor)


def test_cfg_joins_task_and_model_of_which_the_model_wins(tmp_path):
    cfg = {
        "task": {"tokens_per_sample": 512, "dropout": 0.5},
        "model": argparse.Namespace(decoder_layers=2, dropout=0.1),
    }
    got = read_checkpoint(save(tmp_path / "model.pt", args=None, cfg=cfg))
    assert got.settings == {"tokens_per_sample": 512, "decoder_layers": 2, "dropout": 0.1}


class Strange:
    """Pickled under the name of a module that is not there."""

    def __init__(self, value=None):
        self.value = value

    def __reduce__(self):
        return (type(self), ("relu",))


def strange_of(monkeypatch, module):
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("Strange", (Strange,), {"__module__": module, "__qualname__": "Strange"})
    monkeypatch.setattr(sys.modules[module], "Strange", kind, raising=False)
    return kind()


def test_objects_of_fairseq_become_inert_and_choices_their_value(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        one = strange_of(patch, "fairseq.dataclass.utils")
        args = argparse.Namespace(activation_fn=one)
        path = save(tmp_path / "model.pt", args=args, extra_state={"meters": one})
    assert read_checkpoint(path).settings == {"activation_fn": "relu"}


def test_other_names_are_refused_before_anything_happens(tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    for zipped in (True, False):
        path = save(tmp_path / "model.pt", zipped=zipped, args=Harm())
        with pytest.raises(InputError, match="nothing but a checkpoint's numbers, got the name"):
            read_checkpoint(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must say how its model was made, in 'args' or 'cfg', but has neither"),
        ({"model": [1]}, "a checkpoint of fairseq with the entry 'model'"),
        ({"model": {"a": 1}, "args": argparse.Namespace()}, "must consist of tensors, but"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, state, message):
    with pytest.raises(InputError, match=message):
        read_checkpoint(save(tmp_path / "model.pt", **state))


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(CorruptStoreError, match="must be a file but is not"):
        read_checkpoint(tmp_path / "none.pt")
    path = save(tmp_path / "model.pt", args=argparse.Namespace())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CorruptStoreError, match="must be a checkpoint but cannot be read"):
        read_checkpoint(path)
