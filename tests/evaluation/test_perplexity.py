"""Evaluation against a naive loop: one forward pass per token, dense probabilities."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.memories import FixedMemory, PastMemory
from memlm.core.errors import InputError
from memlm.core.merges import Mixture, Union
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows, SlidingWindows, StrideWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.local import LocalMemory
from memlm.models.attach import attach
from memlm.models.extend import extended
from memlm.models.taps import capture, find_tap
from memlm.testing.tiny import VOCABULARY, tiny_model, tiny_tokens

LENGTHS = (23, 1, 9, 30)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def corpus_of(lengths=LENGTHS, *, begin_token=None, seed=0):
    tokens = tiny_tokens(1, sum(lengths), seed=seed)[0].numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if begin_token is not None:
        tokens[offsets[:-1]] = begin_token
    return TokenCorpus.from_tokens(tokens, offsets, begin_token=begin_token)


@torch.no_grad()
def naive(model, corpus, windows, memory=None, merge=None):
    """Log-probability of every target, window by window, one token at a time."""
    result = []
    for place, context, states, logits in positions(model, corpus, windows):
        candidates = None
        if memory is not None:
            state = memory.init_state(1)
            state = memory.observe(context, states, state)
            candidates, _ = memory.read(states[:, -1], state)
        result.append(merged(logits, candidates, merge, int(corpus.tokens[place])))
    return np.array(result)


def positions(model, corpus, windows):
    """Place of every target, with its context, the tap states of it and the model's logits."""
    table, tap = windows.table(corpus), find_tap(model, "auto")
    for begin, first, end in zip(table.begin, table.first, table.end, strict=True):
        for place in range(first, end):
            context = torch.tensor(corpus.tokens[begin:place]).long()[None]
            with capture(model, tap) as seen:
                logits = model(input_ids=context).logits[0, -1].double()
            yield place, context, seen.states, logits


def merged(logits, candidates, merge, target):
    """Log-probability of a target by dense probabilities."""
    probability = torch.softmax(logits, -1)
    if candidates is not None:
        mass = torch.zeros(VOCABULARY, dtype=torch.float64)
        scores = candidates.scores[0].double().masked_fill(~candidates.valid[0], -torch.inf)
        mass.scatter_add_(0, candidates.tokens[0], scores.exp())
        if isinstance(merge, Union):
            joint = logits.exp() + mass
            probability = joint / joint.sum()
        elif mass.sum() > 0:
            lam = merge.lam
            probability = (1 - lam) * probability + lam * mass / mass.sum()
    return math.log(float(probability[target]))


MEMORIES = [
    (None, None),
    (FixedMemory(), Mixture(0.4)),
    (FixedMemory(silent_above=0.0), Mixture(0.9)),
    (FixedMemory(), Union()),
    (PastMemory(), Mixture(0.3)),
    (PastMemory(), Union()),
    (LocalMemory(size=3, temperature=3.0), Mixture(0.3)),
]


@pytest.mark.parametrize(("memory", "merge"), MEMORIES)
@pytest.mark.parametrize(
    "windows",
    [
        SlidingWindows(8, 3),
        SlidingWindows(8, 8, cross_documents=True),
        BlockWindows(5, 4, "line"),
        StrideWindows(10, 4, 2),
    ],
)
def test_equals_a_naive_loop(model, windows, memory, merge):
    corpus = corpus_of()
    expected = naive(model, corpus, windows, memory, merge)
    got = evaluate(
        model,
        corpus,
        windows,
        memory=memory,
        merge=merge,
        batch_tokens=20,
        carry="window",
        keep_tokens=True,
    )
    np.testing.assert_allclose(got.token_log_probabilities, expected, atol=2e-5)
    assert got.perplexity == pytest.approx(np.exp(-expected.mean()), rel=1e-5)

    table = windows.table(corpus)
    places = np.concatenate([np.arange(a, b) for a, b in zip(table.first, table.end, strict=True)])
    document = corpus.document_of(places)
    for number in range(corpus.documents):
        chosen = document == number
        assert got.documents.tokens[number] == chosen.sum()
        assert got.documents.nll[number] == pytest.approx(-expected[chosen].sum(), abs=1e-4)
    assert got.windows.tokens == tuple(table.targets)


def test_the_batch_size_changes_nothing_but_rounding(model):
    corpus, windows = corpus_of(), SlidingWindows(8, 3)
    for memory in (FixedMemory(), PastMemory()):
        one, many = (
            evaluate(model, corpus, windows, memory=memory, batch_tokens=size, keep_tokens=True)
            for size in (1, 10_000)
        )
        np.testing.assert_allclose(
            one.token_log_probabilities, many.token_log_probabilities, atol=1e-5
        )


def test_memories_are_asked_about_scored_tokens_only(model):
    corpus, windows = corpus_of((65,)), SlidingWindows(32, 2)
    memory = FixedMemory()
    evaluate(model, corpus, windows, memory=memory, batch_tokens=64)
    # Batches hold two windows: the first scores 32 tokens, every other one 2.
    assert memory.largest_query == 32 + 2


def test_padding_is_never_shown_to_a_memory_with_state(model):
    corpus, windows = corpus_of((5, 9, 17)), SlidingWindows(16, 16)
    memory = PastMemory()
    evaluate(model, corpus, windows, memory=memory, batch_tokens=1000)
    assert sum(memory.shown) == windows.table(corpus).inputs.sum() == 4 + 8 + 16


def test_no_logits_of_context_tokens(model):
    """The head sees as many rows as there are scored tokens, however much context there is."""

    def head_rows(windows):
        rows = []
        count = lambda _, args: rows.append(args[0].numel() // args[0].shape[-1])  # noqa: E731
        handle = model.lm_head.register_forward_pre_hook(count)
        try:
            evaluate(model, corpus_of((65,)), windows)
        finally:
            handle.remove()
        return sum(rows)

    assert head_rows(SlidingWindows(32, 1)) == head_rows(SlidingWindows(32, 32)) < 2 * 64


def test_weight_zero_is_the_model_alone(model):
    corpus, windows = corpus_of(), SlidingWindows(8, 3)
    alone = evaluate(model, corpus, windows)
    zero = evaluate(model, corpus, windows, memory=FixedMemory(), merge=Mixture(0.0))
    silent = evaluate(model, corpus, windows, memory=FixedMemory(silent_above=-1e9))
    assert zero.documents == silent.documents == alone.documents
    assert silent.protocol["without_candidates"] == silent.tokens
    assert "memory off" in zero.describe()
    assert "memory off" in alone.describe()
    assert not alone.memory_is_on


def test_the_default_merge_is_a_mixture(model):
    got = evaluate(model, corpus_of(), SlidingWindows(8, 3), memory=FixedMemory())
    assert got.protocol["merge"] == Mixture().to_dict()


def test_begin_tokens_are_context_only(model):
    with_begin = evaluate(model, corpus_of(begin_token=1), SlidingWindows(8, 3))
    assert with_begin.protocol["scored"] == {
        "tokens": sum(LENGTHS) - 4,
        "documents": 3,
        "begin_tokens": 4,
        "left_out": 0,
    }
    assert "begin token 1 before each document as context only" in with_begin.describe()
    without = evaluate(model, corpus_of(), SlidingWindows(8, 3))
    assert without.protocol["scored"]["left_out"] == 4
    assert "4 left out, no begin token" in without.describe()


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4).filter(lambda x: max(x) > 1),
    length=st.integers(1, 9),
    batch_tokens=st.integers(1, 60),
)
def test_every_token_is_scored_once(lengths, length, batch_tokens):
    model = tiny_model("llama")
    corpus = corpus_of(lengths)
    got = evaluate(model, corpus, SlidingWindows(length, 1), batch_tokens=batch_tokens)
    assert got.documents.tokens == tuple(max(n - 1, 0) for n in lengths)
    assert sum(got.windows.nll) == pytest.approx(got.nll)


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = tiny_model("llama", tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    got = evaluate(model, corpus_of(), SlidingWindows(8, 4))
    assert got.perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_the_model_comes_back_as_it_was():
    model = tiny_model("gpt2").train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = evaluate(model, corpus_of(), SlidingWindows(8, 3))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    # No dropout: twice the same numbers.
    assert evaluate(model, corpus_of(), SlidingWindows(8, 3)).documents == first.documents


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "bloom", "cohere", "granite"])
def test_families(family):
    model, corpus, windows = tiny_model(family), corpus_of((9, 6)), SlidingWindows(6, 2)
    got = evaluate(model, corpus, windows, keep_tokens=True)
    np.testing.assert_allclose(
        got.token_log_probabilities, naive(model, corpus, windows), atol=5e-5
    )


def test_half_precision_sums_in_float32():
    model, corpus, windows = tiny_model("llama"), corpus_of((64,)), SlidingWindows(16, 8)
    full = evaluate(model, corpus, windows)
    half = evaluate(model.to(torch.bfloat16), corpus, windows)
    assert half.model["dtype"] == "bfloat16"
    assert half.loss == pytest.approx(full.loss, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [None, LocalMemory(temperature=3.0)])
def test_cuda_equals_cpu(memory):
    corpus, windows = corpus_of(), SlidingWindows(8, 3)
    here = evaluate(tiny_model("llama"), corpus, windows, memory=memory)
    there = evaluate(tiny_model("llama").cuda(), corpus, windows, memory=memory)
    assert there.model["device"] == "cuda"
    np.testing.assert_allclose(there.documents.nll, here.documents.nll, rtol=1e-4)


def test_identity_and_versions(model):
    got = evaluate(model, corpus_of(), SlidingWindows(8, 3), threads=1)
    assert got.model["hash"].startswith("xxh3_128:")
    assert got.model["dtype"] == "float32"
    assert got.model["tap"]["name"] == "ffn_input"
    assert got.corpus["hash"] == corpus_of().hash
    assert {"python", "torch", "transformers", "memlm"} <= set(got.versions)
    assert got.protocol["threads"] == 1
    assert 0 < got.seconds.model <= got.seconds.total
    assert got.tokens_per_second > 0


@pytest.mark.parametrize("merge", [Mixture(0.4), Union()])
@pytest.mark.parametrize("memory", [FixedMemory(), LocalMemory(size=6, temperature=3.0)])
@torch.no_grad()
def test_equals_the_loss_of_the_attached_model(model, memory, merge):
    corpus, attached = corpus_of((20,)), attach(model, memory, merge)
    got = evaluate(attached, corpus, SlidingWindows(19, 19))
    tokens = torch.tensor(corpus.tokens).long()[None]
    assert got.loss == pytest.approx(float(attached(tokens, labels=tokens).loss), rel=1e-5)
    assert (
        got.documents
        == evaluate(model, corpus, SlidingWindows(19, 19), memory=memory, merge=merge).documents
    )


# -- refusals ------------------------------------------------------------------------------


def test_nothing_to_score(model):
    with pytest.raises(InputError, match="at least one token"):
        evaluate(model, corpus_of((1, 1)), SlidingWindows(8, 3))


def test_tokens_outside_the_vocabulary(model):
    corpus = TokenCorpus.from_tokens([3, 4, 5, 6, VOCABULARY, 7], [0, 3, 6], names=["a", "b"])
    with pytest.raises(InputError, match=r"vocabulary size \(61\), got 61 in document 'b'"):
        evaluate(model, corpus, SlidingWindows(8, 3))


def test_windows_longer_than_the_model(model):
    with pytest.raises(InputError, match=r"128 positions, got 129"):
        evaluate(model, corpus_of((200,)), SlidingWindows(129, 3))
    assert evaluate(model, corpus_of((200,)), SlidingWindows(128, 64)).tokens == 199


def test_a_merge_without_a_memory(model):
    with pytest.raises(InputError, match="a merge needs a memory"):
        evaluate(model, corpus_of(), SlidingWindows(8, 3), merge=Mixture(0.2))


def test_a_second_memory(model):
    attached = attach(model, FixedMemory())
    with pytest.raises(InputError, match="brings its own memory"):
        evaluate(attached, corpus_of(), SlidingWindows(8, 3), memory=FixedMemory())


def test_losses_that_are_not_finite_name_the_document():
    model = tiny_model("llama")
    corpus = TokenCorpus.from_tokens([3, 4, 5, 6, 40, 8], [0, 3, 6], names=["good", "bad"])
    with torch.no_grad():
        model.model.embed_tokens.weight[40] = torch.nan
    with pytest.raises(InputError, match=r"token 1 of document 'bad' has nan; look for non-finite"):
        evaluate(model, corpus, SlidingWindows(8, 3))


def test_memory_alone_is_refused_where_it_gives_zero(model):
    with pytest.raises(InputError, match="use lam below 1"):
        evaluate(model, corpus_of(), SlidingWindows(8, 3), memory=FixedMemory(), merge=Mixture(1.0))


def test_an_extended_model_is_scored_beyond_its_positions():
    model = tiny_model("llama")  # 128 positions
    corpus = TokenCorpus.from_tokens(np.random.default_rng(0).integers(3, 60, 200))
    whole = SlidingWindows(length=199, stride=199)
    with pytest.raises(InputError, match="128 positions"):
        evaluate(model, corpus, whole, progress=False)
    with extended(model, window=16, sinks=2):
        scored = evaluate(model, corpus, whole, progress=False)
        with torch.no_grad():
            logits = model(torch.from_numpy(corpus.tokens[None, :-1].astype(np.int64))).logits
    expected = torch.nn.functional.cross_entropy(
        logits[0], torch.from_numpy(corpus.tokens[1:].astype(np.int64)), reduction="sum"
    )
    assert scored.nll == pytest.approx(float(expected), rel=1e-5)
