"""Checkpoints of retro-pytorch of several versions, and ones that are not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memlm.core.errors import InputError
from memlm.importers.retro_checkpoint import import_retro

CASE = Path(__file__).parents[1] / "golden" / "retro" / "generate_eos"


@pytest.fixture
def state():
    return load_file(CASE / "weights.safetensors")


@pytest.fixture
def chunk_size():
    return json.loads((CASE / "config.json").read_text())["chunk_size"]


def older(state):
    """Keys and values fused, and a wrapper's prefix."""
    found = {}
    for name, value in state.items():
        if name.endswith("to_k.weight"):
            other = state[name.replace("to_k", "to_v")]
            found["retro." + name.replace("to_k", "to_kv")] = torch.cat([value, other])
        elif name.endswith("null_k"):
            other = state[name[:-1] + "v"]
            found["retro." + name[:-1] + "kv"] = torch.stack([value, other])
        elif not name.endswith(("to_v.weight", "null_v")):
            found["retro." + name] = value
    return found


def test_older_names_and_a_wrapper(state, chunk_size):
    new = import_retro(state, chunk_size=chunk_size)
    old = import_retro(older(state), chunk_size=chunk_size)
    assert old.config.to_dict() == new.config.to_dict()
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name]), name


def test_settings_can_be_changed(state, chunk_size):
    model = import_retro(state, chunk_size=chunk_size, attention_dropout=0.1, compatibility="none")
    assert model.config.attention_dropout == 0.1
    assert model.config.compatibility == "none"
    assert not model.training


def test_no_such_checkpoint(state, chunk_size):
    with pytest.raises(InputError, match=r"must have 'token_emb\.weight'"):
        import_retro({"weight": torch.ones(2)}, chunk_size=chunk_size)
    with pytest.raises(InputError, match="must not have 'speed'"):
        import_retro({**state, "speed": torch.ones(2)}, chunk_size=chunk_size)
    del state["decoder.layers.0.2.fn.ff.0.bias"]
    with pytest.raises(
        InputError, match=r"nothing gives model\.layers\.0\.feed\.inner\.expand\.bias"
    ):
        import_retro(state, chunk_size=chunk_size)
