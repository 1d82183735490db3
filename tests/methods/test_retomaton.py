"""RetoMaton on a model: decoding, rescoring and evaluation all walk the same automaton."""

import numpy as np
import pytest
import torch

from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.memory.knn import KnnMemory
from memlm.methods.retomaton import retomaton
from memlm.models.fingerprint import model_hash
from memlm.models.taps import find_tap, forward_to_tap
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

DOCUMENTS, LENGTH, PROMPT, NEW = 12, 40, 6, 14
GREEDY = {
    "min_new_tokens": NEW,
    "max_new_tokens": NEW,
    "pad_token_id": 0,
    "do_sample": False,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def text():
    return tiny_tokens(DOCUMENTS, LENGTH)


@pytest.fixture(scope="module")
def store(model, text, tmp_path_factory):
    states = forward_to_tap(model, find_tap(model, "ffn_input"), text)[:, :-1]
    store = save_arrays(
        tmp_path_factory.mktemp("retomaton") / "store",
        states.flatten(0, 1),
        text[:, 1:].flatten(),
        documents=np.arange(DOCUMENTS).repeat(LENGTH - 1),
        positions=np.tile(np.arange(1, LENGTH), DOCUMENTS),
        model_hash=model_hash(model),
        tap="ffn_input",
        dtype="float32",
    )
    cluster_store(store, ClusterConfig(clusters=8), quiet=True)
    return store


@pytest.fixture(params=[1, 3, 10**9], ids=["one", "three", "always"])
def lm(request, model, store):
    return retomaton(
        model, store, k=8, lam=0.6, temperature=3.0, min_knns=request.param, max_knns=32
    )


def scores_of(lm, tokens):
    with torch.no_grad():
        logp = lm(tokens).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
    return logp.gather(-1, tokens[:, PROMPT:, None])[..., 0].sum(-1)


def test_greedy_walks_as_rescoring_does(lm, text):
    made = lm.generate(text[:4, :PROMPT], **GREEDY, return_dict_in_generate=True)
    with torch.no_grad():
        rows = lm(made.sequences).logits[:, PROMPT - 1 : -1].clone()
    rows[..., 2] = -torch.inf  # min_new_tokens forbids the end token
    assert torch.equal(rows.argmax(-1), made.sequences[:, PROMPT:])
    stats = made.past_key_values.stats()
    assert stats["steps"] == 4 * (PROMPT + NEW - 1)
    assert (stats["saved"] > 0) == (lm.memory.config.min_knns < 10**9)


def test_a_known_text_is_recited_without_searching(model, store, text):
    lm = retomaton(model, store, k=4, lam=0.95, min_knns=1, temperature=0.1)
    made = lm.generate(text[:5, :PROMPT], **GREEDY, return_dict_in_generate=True)
    assert torch.equal(made.sequences, text[:5, : PROMPT + NEW])
    stats = made.past_key_values.stats()
    assert stats["searches"] == 5
    assert stats["saved"] == 1 - 1 / (PROMPT + NEW - 1)


def test_beams_take_their_pointers_along(lm, text):
    made = lm.generate(
        text[:2, :PROMPT],
        **{**GREEDY, "min_new_tokens": None, "eos_token_id": None},
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert (made.beam_indices[:, 1:] != made.beam_indices[:, :-1]).any()
    torch.testing.assert_close(
        made.sequences_scores, scores_of(lm, made.sequences), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_walks_as_single_rows_do(lm, text, side):
    lengths = [7, 3, 5]
    tokens = text[:3, :7]
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        place = slice(7 - length, 7) if side == "left" else slice(0, length)
        padded[row, place], mask[row, place] = tokens[row, :length], 1
    made = lm.generate(padded, attention_mask=mask, **GREEDY)
    for row, length in enumerate(lengths):
        alone = lm.generate(tokens[row : row + 1, :length], **GREEDY)[0]
        assert torch.equal(made[row, 7:], alone[length:])


def test_assisted_decoding_takes_steps_back(lm, text):
    prompt = text[:1, :PROMPT].repeat(1, 3)
    expected = lm.generate(prompt, **GREEDY, return_dict_in_generate=True)
    made = lm.generate(prompt, **GREEDY, prompt_lookup_num_tokens=4, return_dict_in_generate=True)
    assert torch.equal(made.sequences, expected.sequences)
    one, other = (out.past_key_values.state for out in (made, expected))
    assert one.length == other.length
    assert all(torch.equal(*pair) for pair in zip(one.counters, other.counters, strict=True))


def test_sampling_is_repeatable(lm, text):
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        ask = {**GREEDY, "do_sample": True, "num_return_sequences": 3}
        made.append(lm.generate(text[:2, :PROMPT], **ask))
    assert torch.equal(*made)


def test_evaluation_agrees_with_the_attached_model(lm, text):
    tokens = tiny_tokens(3, 24, seed=7)
    tokens[0] = text[0, :24]
    corpus = TokenCorpus.from_tokens(tokens.flatten().numpy(), np.arange(4) * 24)
    got = evaluate(
        lm.base,
        corpus,
        SlidingWindows(length=64, stride=64),
        memory=lm.memory,
        merge=lm.merge,
        keep_tokens=True,
        progress=False,
    )
    with torch.no_grad():
        logp = lm(tokens).logits.log_softmax(-1)[:, :-1]
    expected = logp.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(
        torch.from_numpy(got.token_log_probabilities).float().view_as(expected),
        expected,
        atol=1e-4,
        rtol=0,
    )


def test_no_search_is_saved_for_free_with_all_neighbours(model, store):
    """Every entry found at every step, each counted once: kNN-LM."""
    lm = retomaton(model, store, k=len(store), min_knns=10**9, temperature=3.0)
    knn = KnnMemory(store, k=len(store), temperature=3.0)
    corpus = TokenCorpus.from_tokens(tiny_tokens(1, 30, seed=3)[0].numpy())
    windows = SlidingWindows(length=64, stride=64)
    values = [
        evaluate(model, corpus, windows, memory=memory, merge=lm.merge, progress=False)
        for memory in (lm.memory, knn)
    ]
    assert values[0].perplexity == pytest.approx(values[1].perplexity, rel=1e-5)
