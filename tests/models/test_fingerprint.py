"""Fingerprints change with what changes keys, and with nothing else."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from memlm.core.errors import UnsupportedModelError
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.testing.tiny import tiny_model


def tokenizer(*words: str, end: str = "<end>") -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<unk>", "<end>", "<pad>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token="<pad>")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_a_saved_copy_keeps_its_fingerprint(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model_hash(copy) == model_hash(model)


def test_settings_that_change_no_key_do_not_count():
    model = tiny_model("gpt2")
    before = model_hash(model)
    model.config.use_cache = False
    model.config.resid_pdrop = 0.3
    model.config.eos_token_id = 7
    model.config.name_or_path = "elsewhere"
    assert model_hash(model.train()) == before


def test_every_kind_of_change_counts():
    seen = {model_hash(tiny_model("llama")), model_hash(tiny_model("llama", seed=1))}
    seen.add(model_hash(tiny_model("llama").to(torch.bfloat16)))
    seen.add(model_hash(tiny_model("llama", rms_norm_eps=1e-3)))
    one_bit = tiny_model("llama")
    with torch.no_grad():
        weight = one_bit.model.layers[1].mlp.up_proj.weight
        weight.view(torch.int32)[3, 4] ^= 1
    seen.add(model_hash(one_bit))
    swapped = tiny_model("llama")
    first, second = swapped.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp
    seen.add(model_hash(swapped))
    assert len(seen) == 6


def test_weights_that_are_not_in_memory_are_refused():
    with pytest.raises(UnsupportedModelError, match="meta device"):
        model_hash(tiny_model("llama").to("meta"))


def test_tokenizers():
    same = tokenizer_hash(tokenizer("a", "b"))
    assert tokenizer_hash(tokenizer("a", "b")) == same
    assert tokenizer_hash(tokenizer("b", "a")) != same
    assert tokenizer_hash(tokenizer("a", "b", end="<pad>")) != same


def test_a_used_and_a_saved_tokenizer_keep_their_fingerprint(tmp_path):
    used = tokenizer("a", "b")
    before = tokenizer_hash(used)
    used(["a b", "a"], padding=True, truncation=True, max_length=3)
    assert tokenizer_hash(used) == before
    used.save_pretrained(tmp_path)
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == before
