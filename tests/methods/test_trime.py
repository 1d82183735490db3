"""TRIME as a whole: three memories under one softmax, read ahead, generated with, saved."""

import numpy as np
import pytest
import torch

import memlm
from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.methods.trime import begin_with, remember, trime
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

TEXT = tiny_tokens(2, 40, vocab_size=9, seed=1)


@pytest.fixture
def store(tmp_path):
    keys = torch.randn(30, 16, generator=torch.Generator().manual_seed(1))
    return save_arrays(tmp_path / "store", keys, torch.arange(30) % 9 + 3, metric="ip")


@pytest.mark.parametrize("family", ["llama", "gpt2", "adaptive_lm", "gemma2"])
def test_a_model_with_all_memories_generates_and_is_evaluated(family, store):
    model = tiny_model(family)
    lm = trime(model, store, long=20, k=4)
    made = lm.generate(TEXT, max_new_tokens=5, do_sample=False)
    assert made.shape == (2, 45)
    corpus = TokenCorpus.from_tokens(TEXT.flatten().numpy().astype(np.int32), np.array([0, 40, 80]))
    windows = memlm.SlidingWindows(8, 4)
    result = memlm.evaluate(lm, corpus, windows, carry="window", progress=False)
    assert result.perplexity != memlm.evaluate(model, corpus, windows, progress=False).perplexity


def test_what_was_remembered_is_used_in_generation():
    """Text that was read before, and is gone from the window, is predicted again."""
    model = tiny_model("llama")
    lm = trime(model, long=100, temperature=0.02)
    state = remember(lm, TEXT, window=16)
    assert lm.memory.stats(state)["members"][1]["entries"] == 39
    first = TEXT[:, :1]
    logits = [
        lm(first, past_key_values=cache).logits for cache in (None, begin_with(lm, state, rows=2))
    ]
    before, after = (part[:, -1].log_softmax(-1) for part in logits)
    right = TEXT[:, 1:2]
    assert (after.gather(1, right) > -1e-3).all()
    assert (before.gather(1, right) < -0.1).all()
    made = lm.generate(
        first, past_key_values=begin_with(lm, state, rows=2), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(made, TEXT[:, :5])


def test_reading_in_two_calls_is_reading_in_one():
    lm = trime(tiny_model("llama"), long=100)
    once = remember(lm, TEXT, window=14)
    twice = remember(lm, TEXT[:, 13:], remember(lm, TEXT[:, :14], window=14), window=14)
    for cache in (once, twice):
        assert lm.memory.stats(cache)["members"][1]["entries"] == 39
    found = [
        lm(TEXT[:, :3], past_key_values=begin_with(lm, state, rows=2)).logits
        for state in (once, twice)
    ]
    torch.testing.assert_close(*found)


def test_memories_grow_while_generating_and_go_on_in_the_next_call():
    lm = trime(tiny_model("llama"), long=100)
    output = lm.generate(TEXT, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    stats = output.past_key_values.stats()["members"]
    assert [part["entries"] for part in stats] == [44, 0]
    state = lm.memory.finish(output.past_key_values.state)
    later = begin_with(lm, state, rows=2, copies=3)
    assert later.stats()["members"][1]["entries"] == 44
    beams = lm.generate(TEXT[:, :4], past_key_values=later, num_beams=3, max_new_tokens=4)
    assert beams.shape == (2, 8)


def test_a_prompt_costs_one_read(store, monkeypatch):
    """And one for every token that is generated."""
    model, asked = tiny_model("llama"), []
    lm = trime(model, store, long=100, k=4)
    search = memlm.KnnMemory.read
    monkeypatch.setattr(
        memlm.KnnMemory, "read", lambda *arguments: asked.append(1) or search(*arguments)
    )
    lm.generate(TEXT, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert len(asked) == 5


def test_beams_with_memory_do_not_depend_on_the_other_row():
    lm = trime(tiny_model("llama"), long=100)
    state = remember(lm, TEXT, window=16)
    both = lm.generate(
        TEXT[:, :4],
        past_key_values=begin_with(lm, state, rows=2, copies=2),
        num_beams=2,
        max_new_tokens=6,
        do_sample=False,
    )
    for row in range(2):
        own = lm.memory.select_rows(state, torch.tensor([row]))
        alone = lm.generate(
            TEXT[row : row + 1, :4],
            past_key_values=begin_with(lm, own, copies=2),
            num_beams=2,
            max_new_tokens=6,
            do_sample=False,
        )
        assert torch.equal(alone[0], both[row])


def test_interpolation_is_the_same_in_logits_scores_and_after_loading(store, tmp_path):
    """(1 - lam) p_union + lam p_store, wherever the model is used."""
    model = tiny_model("llama")
    plain = trime(model, store, long=20, k=4)
    lm = trime(model, store, long=20, k=4, interpolate=(0.3, 2.5))
    text = TEXT[:1]
    rows = lm(text).logits.log_softmax(-1)
    alone = memlm.attach(model, memlm.KnnMemory(store, k=4, temperature=2.5), memlm.Mixture(1.0))
    mixed = 0.7 * plain(text).logits.softmax(-1) + 0.3 * alone(text).logits.softmax(-1)
    torch.testing.assert_close(rows.exp(), mixed)
    corpus = TokenCorpus.from_tokens(text[0].numpy().astype(np.int32))
    whole = memlm.SlidingWindows(40, 40)
    result = memlm.evaluate(lm, corpus, whole, carry="window", keep_tokens=True, progress=False)
    expected = rows[0, :-1].gather(-1, text[0, 1:, None])[:, 0]
    assert result.loss == pytest.approx(-expected.mean().item(), rel=1e-5)
    made = lm.generate(text, max_new_tokens=3, do_sample=False)
    assert made[0, 40] == rows[0, -1].argmax()
    lm.save_pretrained(tmp_path / "lm")
    again = memlm.MemoryForCausalLM.from_pretrained(tmp_path / "lm")
    torch.testing.assert_close(again(text).logits, lm(text).logits)
    padded = torch.cat([torch.zeros_like(text[:, :3]), text], 1)
    mask = torch.cat([torch.zeros_like(text[:, :3]), torch.ones_like(text)], 1)
    shifted = lm(padded, attention_mask=mask).logits[:, 3:].log_softmax(-1)
    torch.testing.assert_close(shifted, rows, atol=1e-4, rtol=1e-4)


def test_it_is_saved_and_loaded(store, tmp_path):
    lm = trime(tiny_model("llama"), store, long=20, k=4)
    lm.save_pretrained(tmp_path / "lm")
    again = memlm.MemoryForCausalLM.from_pretrained(tmp_path / "lm")
    assert again.memory.describe() == lm.memory.describe()
    torch.testing.assert_close(again(TEXT).logits, lm(TEXT).logits)


def test_bad_input(tmp_path):
    model = tiny_model("llama")
    store = save_arrays(tmp_path / "l2", torch.randn(5, 16), torch.arange(5), metric="l2")
    with pytest.raises(InputError, match="metric must be 'ip', got 'l2'"):
        trime(model, store)
    with pytest.raises(InputError, match="only a long-term memory reads ahead"):
        remember(trime(model), TEXT)
    with pytest.raises(InputError, match="window must be at least 2 tokens, got 1"):
        remember(trime(model, long=5), TEXT, window=1)
