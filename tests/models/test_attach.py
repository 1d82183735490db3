"""Attaching checks that the parts belong together, and detaching leaves nothing behind."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from memlm.core.errors import FingerprintError, InputError, UnsupportedModelError
from memlm.core.merges import Mixture, Union
from memlm.models.attach import attach
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.testing.tiny import FAMILIES, tiny_model, tiny_tokens

from .memories import Counter, Fixed
from .test_taps import hooks


def with_store(**identity):
    """A memory whose store says what made it."""
    memory = Fixed()
    values = {"tap": "ffn_input", "model_hash": None, "tokenizer_hash": None, "model": "tiny"}
    made = SimpleNamespace(**values | identity)
    memory.store = SimpleNamespace(path="stores/x", manifest=SimpleNamespace(identity=made))
    return memory


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_detaching_returns_the_identical_untouched_model(family):
    model, tokens = tiny_model(family), tiny_tokens(2, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    attributes = set(vars(model))
    with torch.no_grad():
        logits = model(tokens).logits
    lm = attach(model, Fixed())
    lm(tokens, labels=tokens).loss.backward()
    lm.generate(tokens, max_new_tokens=3, num_beams=2, pad_token_id=0)
    assert lm.detach() is model
    assert hooks(model) == 0
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, logits)


def test_hooks_are_gone_after_a_failed_forward():
    lm = attach(tiny_model(), Fixed(dim=3))  # a memory of another width
    with pytest.raises(RuntimeError):
        lm(tiny_tokens(1, 4))
    assert hooks(lm) == 0


def test_it_is_a_hugging_face_model_like_the_base():
    model = tiny_model("gemma2")
    lm = attach(model, Fixed())
    assert lm.get_input_embeddings() is model.get_input_embeddings()
    assert lm.get_output_embeddings() is model.get_output_embeddings()
    assert (lm.dtype, lm.device) == (model.dtype, model.device)
    assert lm.num_parameters() == model.num_parameters()
    assert lm.config.vocab_size == model.config.vocab_size
    assert lm.config.get_text_config(decoder=True) is model.config
    assert not lm.training
    assert not lm.config.is_encoder_decoder
    assert lm.can_generate()
    assert lm.to(torch.bfloat16).dtype == model.dtype == torch.bfloat16
    assert attach(model.train(), Fixed()).training
    with pytest.raises(AttributeError, match="no_such"):
        _ = lm.config.no_such


def test_embeddings_can_be_replaced_and_resized():
    lm = attach(tiny_model(tie_word_embeddings=False), Fixed())
    table = torch.nn.Embedding(61, 16)
    lm.set_input_embeddings(table)
    assert lm.base.get_input_embeddings() is table
    head = torch.nn.Linear(16, 61, bias=False)
    lm.set_output_embeddings(head)
    assert lm.base.lm_head is head
    lm.resize_token_embeddings(64)
    assert lm(tiny_tokens(1, 4)).logits.shape == (1, 4, 64)


def test_the_default_merge_is_the_mixture_and_may_be_replaced():
    lm, tokens = attach(tiny_model(), Fixed()), tiny_tokens(1, 4)
    assert lm.merge == Mixture()
    with torch.no_grad():
        mixed = lm(tokens).logits
        lm.merge = Union()
        assert not torch.equal(lm(tokens).logits, mixed)
        lm.merge = Mixture(0.0)
        assert torch.equal(lm(tokens).logits, lm.base(tokens).logits)


def test_the_tap_is_the_stores_unless_said_otherwise():
    model = tiny_model()
    assert attach(model, Fixed()).tap.name == "ffn_input"
    assert attach(model, with_store(tap="final")).tap.name == "final"
    assert attach(model, with_store(tap="unknown")).tap.name == "ffn_input"
    assert attach(model, with_store(), tap="ffn_input").tap.name == "ffn_input"
    with pytest.raises(FingerprintError, match="tap 'final', got tap 'ffn_input'"):
        attach(model, with_store(tap="final"), tap="ffn_input")


def test_a_store_of_another_model_is_refused():
    model, other = tiny_model(), tiny_model(seed=1)
    mine, theirs = model_hash(model), model_hash(other)
    attach(model, with_store(model_hash=mine))
    with pytest.raises(FingerprintError, match=f"stores/x was made by model {theirs} .*{mine}"):
        attach(model, with_store(model_hash=theirs))
    attach(model, with_store(model_hash=theirs), verify=False)
    with pytest.raises(FingerprintError, match="bfloat16"):
        attach(tiny_model().to(torch.bfloat16), with_store(model_hash=mine))


def test_a_store_of_another_tokenizer_is_refused(tokenizer):
    mine = tokenizer_hash(tokenizer)
    attach(tiny_model(), with_store(tokenizer_hash=mine), tokenizer=tokenizer)
    attach(tiny_model(), with_store(), tokenizer=tokenizer)
    with pytest.raises(FingerprintError, match=f"tokenizer xxh3_128:0, got {mine}"):
        attach(tiny_model(), with_store(tokenizer_hash="xxh3_128:0"), tokenizer=tokenizer)


def test_a_model_has_one_memory_at_a_time():
    lm = attach(tiny_model(), Fixed())
    with pytest.raises(InputError, match="detach"):
        attach(lm, Counter())
    attach(lm.detach(), Counter())


def test_models_without_a_usual_cache_or_head_are_refused():
    recurrent = AutoConfig.for_model(
        "mamba", vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    with pytest.raises(UnsupportedModelError, match="past_key_values"):
        attach(AutoModelForCausalLM.from_config(recurrent), Fixed())
    headless = AutoModel.from_config(tiny_model().config)
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        attach(headless, Fixed())
