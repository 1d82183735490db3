"""A saved model with memory is found again, or the error says what is missing or different."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm.core.errors import FingerprintError, InputError, StoreError
from memlm.core.merges import Mixture, Union
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.models.fingerprint import model_hash
from memlm.models.taps import find_tap, forward_to_tap
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore
from memlm.testing.tiny import tiny_model, tiny_tokens

from .memories import Fixed

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def make_store(model, path, seed: int = 3) -> Datastore:
    tokens = tiny_tokens(6, 12, seed=seed)
    with torch.no_grad():
        keys = forward_to_tap(model, find_tap(model), tokens)[:, :-1].flatten(0, 1)
    return save_arrays(
        path,
        keys,
        tokens[:, 1:].flatten(),
        model="tiny",
        model_hash=model_hash(model),
        tap="ffn_input",
    )


@pytest.fixture
def lm(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    store = make_store(model, tmp_path / "store")
    return attach(model, KnnMemory(store, k=8, temperature=20.0), Mixture(0.3))


def same(a, b):
    tokens = tiny_tokens(2, 6)
    with torch.no_grad():
        assert torch.equal(a(tokens).logits, b(tokens).logits)
    assert torch.equal(a.generate(tokens, **GREEDY), b.generate(tokens, **GREEDY))


@pytest.mark.parametrize("base", ["copy", "reference"])
@pytest.mark.parametrize("loader", [MemoryForCausalLM, AutoModelForCausalLM])
def test_round_trip(lm, tmp_path, base, loader):
    lm.merge = Union() if base == "copy" else Mixture(0.7)
    lm.generation_config.max_new_tokens = 11
    lm.save_pretrained(tmp_path / "saved", base=base)
    assert (tmp_path / "saved" / "base").exists() == (base == "copy")
    loaded = loader.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert isinstance(loaded, MemoryForCausalLM)
    assert (loaded.merge, loaded.tap) == (lm.merge, lm.tap)
    assert loaded.memory.config == lm.memory.config
    assert loaded.memory.store.fingerprint == lm.memory.store.fingerprint
    assert loaded.generation_config.max_new_tokens == 11
    same(loaded, lm)


def test_the_whole_folder_may_move(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(tmp_path, moved)
    same(MemoryForCausalLM.from_pretrained(moved / "saved"), lm)


def test_only_the_model_may_move(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.move(tmp_path / "saved", tmp_path / "a" / "b" / "saved")
    same(MemoryForCausalLM.from_pretrained(tmp_path / "a" / "b" / "saved"), lm)


def test_a_moved_store_is_asked_for(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="say where with `store`"):
        MemoryForCausalLM.from_pretrained(tmp_path / "saved")
    same(MemoryForCausalLM.from_pretrained(tmp_path / "saved", store=tmp_path / "elsewhere"), lm)


def test_another_store_is_refused(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    other = make_store(lm.base, tmp_path / "other", seed=9)
    match = f"{lm.memory.store.fingerprint}, got {other.fingerprint}"
    with pytest.raises(FingerprintError, match=match):
        MemoryForCausalLM.from_pretrained(tmp_path / "saved", store=tmp_path / "other")


@pytest.mark.parametrize("base", ["copy", "reference"])
def test_changed_weights_are_refused(lm, tmp_path, base):
    lm.save_pretrained(tmp_path / "saved", base=base)
    place = tmp_path / ("saved/base" if base == "copy" else "model")
    before, changed = model_hash(lm.base), tiny_model(seed=5)
    changed.save_pretrained(place)
    with pytest.raises(FingerprintError, match=f"{before}, got {model_hash(changed)}"):
        MemoryForCausalLM.from_pretrained(tmp_path / "saved")
    same(MemoryForCausalLM.from_pretrained(tmp_path / "saved", base=lm.base), lm)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path / "saved", verify=False)
    assert model_hash(loaded.base) == model_hash(changed)


def test_another_dtype_needs_verify_false(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    with pytest.raises(FingerprintError, match="bfloat16"):
        MemoryForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    loaded = MemoryForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, verify=False
    )
    assert loaded.dtype == torch.bfloat16
    loaded.generate(tiny_tokens(1, 4), **GREEDY)


def test_a_reference_needs_a_model_from_somewhere(tmp_path):
    lm = attach(tiny_model(), LocalMemory())
    with pytest.raises(InputError, match="base='copy'"):
        lm.save_pretrained(tmp_path, base="reference")
    with pytest.raises(InputError, match="'copy' or 'reference', got 'link'"):
        lm.save_pretrained(tmp_path, base="link")


def test_a_local_memory_is_made_again_from_its_settings(tmp_path):
    lm = attach(tiny_model(), LocalMemory(size=5, temperature=4.0), Union())
    lm.save_pretrained(tmp_path)
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    assert loaded.memory == lm.memory
    same(loaded, lm)


def test_an_automaton_is_made_again_from_its_store_and_settings(tmp_path):
    model = tiny_model()
    store = make_store(model, tmp_path / "store")
    memory = AutomatonMemory(store, k=4, min_knns=2, temperature=3.0)
    lm = attach(model, memory, Mixture(0.5))
    lm.save_pretrained(tmp_path / "lm")
    loaded = MemoryForCausalLM.from_pretrained(tmp_path / "lm")
    assert isinstance(loaded.memory, AutomatonMemory)
    assert loaded.memory.config == memory.config
    same(loaded, lm)


def test_a_hand_made_memory_has_to_be_passed(tmp_path):
    lm = attach(tiny_model(), Fixed())
    lm.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"'memory': 'fixed'.*pass it as `memory`"):
        MemoryForCausalLM.from_pretrained(tmp_path)
    same(MemoryForCausalLM.from_pretrained(tmp_path, memory=lm.memory), lm)


def test_a_trainers_state_dict_of_the_whole_is_saved_as_the_base(tmp_path):
    lm = attach(tiny_model("gpt2"), LocalMemory())
    lm.save_pretrained(tmp_path, state_dict=lm.state_dict())
    loaded = MemoryForCausalLM.from_pretrained(tmp_path)
    same(loaded, lm)
