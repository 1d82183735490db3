"""Random skipping: the share, the seed, and nothing but the text decides."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.skipping import SkippingMemory
from memlm.models.attach import attach
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

DIM = 16


@pytest.fixture(scope="module")
def knn(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(60, DIM, generator=generator)
    values = tiny_tokens(1, 60, seed=4)[0]
    return KnnMemory(save_arrays(tmp_path_factory.mktemp("skip") / "s", keys, values), k=5)


def walk(memory, tokens, queries, valid=None):
    """Where each row asked, ``(rows, time)``, and the last state."""
    state, asked = memory.init_state(len(tokens)), []
    for time in range(tokens.shape[1]):
        here = slice(time, time + 1)
        mask = {} if valid is None else {"valid": valid[:, here]}
        state = memory.observe(tokens[:, here], queries[:, here], state, **mask)
        candidates, state = memory.read(queries[:, time], state)
        asked.append(candidates.valid.any(1))
    return torch.stack(asked, 1), state


def queries_for(tokens, seed=0):
    return torch.randn(*tokens.shape, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_the_share_is_kept_and_counted(knn, share):
    memory = SkippingMemory(knn, share=share, seed=3)
    tokens = tiny_tokens(20, 200)
    asked, state = walk(memory, tokens, queries_for(tokens))
    stats = memory.stats(state)
    assert stats["steps"] == tokens.numel()
    assert stats["searches"] == asked.sum()
    # 4,000 draws: five standard deviations are 0.04
    assert stats["saved"] == pytest.approx(share, abs=0.0 if share in (0, 1) else 0.04)


def test_positions_are_drawn_one_by_one(knn):
    """Neighbouring positions, rows and seeds agree no more often than chance has it."""
    tokens = tiny_tokens(20, 200)
    one, other = (
        walk(SkippingMemory(knn, share=0.5, seed=seed), tokens, queries_for(tokens))[0]
        for seed in (1, 2)
    )
    for a, b in ((one[:, 1:], one[:, :-1]), (one[1:], one[:-1]), (one, other)):
        assert (a == b).float().mean() == pytest.approx(0.5, abs=0.05)


def test_who_asks_hears_what_the_memory_inside_says(knn):
    memory = SkippingMemory(knn, share=0.5)
    tokens = tiny_tokens(8, 1)
    queries = queries_for(tokens)
    state = memory.observe(tokens, queries, memory.init_state(8))
    got, _ = memory.read(queries[:, 0], state)
    asking = got.valid.any(1)
    assert 0 < asking.sum() < 8
    expected, _ = knn.read(queries[asking, 0])
    for mine, its in zip(got, expected, strict=True):
        torch.testing.assert_close(mine[asking], its)
    partial, _ = memory.score(queries[:, 0], tokens[:, 0], state)
    assert torch.equal(torch.isneginf(partial.lse), ~asking)


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
def test_company_and_padding_change_nothing(knn, lengths, left, seed):
    memory, width = SkippingMemory(knn, share=0.4, seed=seed), max(lengths)
    tokens = tiny_tokens(len(lengths), width, seed=seed)
    queries = queries_for(tokens)
    padded, keys = torch.zeros_like(tokens), torch.zeros_like(queries)
    valid = torch.zeros_like(tokens, dtype=torch.bool)
    places = [slice(width - n, width) if left else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        padded[row, place], keys[row, place] = tokens[row, :n], queries[row, :n]
        valid[row, place] = True
    asked, state = walk(memory, padded, keys, valid)
    alone = [
        walk(memory, tokens[row : row + 1, :n], queries[row : row + 1, :n])
        for row, n in enumerate(lengths)
    ]
    for row, (place, (expected, _)) in enumerate(zip(places, alone, strict=True)):
        assert torch.equal(asked[row, place], expected[0])
        assert asked[row].sum() == expected.sum()
    for name in ("steps", "searches"):
        assert memory.stats(state)[name] == sum(memory.stats(s)[name] for _, s in alone)


def test_rows_are_copied_and_positions_taken_back(knn):
    memory, tokens = SkippingMemory(knn, share=0.5, history=6), tiny_tokens(3, 20)
    queries = queries_for(tokens)
    _, whole = walk(memory, tokens, queries)
    _, part = walk(memory, tokens[:, :15], queries[:, :15])
    back = memory.crop(whole, 15)
    assert torch.equal(back.past[:, -1], part.past[:, -1])
    chosen = memory.select_rows(whole, torch.tensor([2, 0, 0]))
    assert torch.equal(chosen.past[:, -1], whole.past[[2, 0, 0], -1])
    assert torch.equal(memory.crop(whole, 0).past, memory.init_state(3).past)
    with pytest.raises(InputError, match="at most 6 positions can be taken back, got 7"):
        memory.crop(whole, 13)
    with pytest.raises(InputError, match="between 0 and 20, got 21"):
        memory.crop(whole, 21)


def test_pieces_lead_to_the_same_state(knn):
    memory, tokens = SkippingMemory(knn), tiny_tokens(2, 9)
    at_once = memory.observe(tokens, queries_for(tokens), memory.init_state(2))
    state = memory.init_state(2)
    for piece in tokens.split([4, 1, 4], dim=1):
        state = memory.observe(piece, queries_for(piece), state)
    assert torch.equal(state.past[:, -1, 0], at_once.past[:, -1, 0])


def test_evaluation_lies_between_the_model_and_its_memory(knn):
    model = tiny_model("llama")
    corpus = TokenCorpus.from_tokens(tiny_tokens(1, 400, seed=8)[0].numpy(), [0, 150, 400])
    windows = SlidingWindows(32, 16)
    rows = {
        share: evaluate(model, corpus, windows, memory=SkippingMemory(knn, share=share))
        for share in (0.0, 0.5, 1.0)
    }
    full = evaluate(model, corpus, windows, memory=knn)
    np.testing.assert_allclose(rows[0.0].documents.nll, full.documents.nll, rtol=1e-6)
    alone = evaluate(model, corpus, windows)
    np.testing.assert_allclose(rows[1.0].documents.nll, alone.documents.nll, rtol=1e-6)
    assert 0.4 < rows[0.5].saved < 0.6
    assert rows[0.5].protocol["without_candidates"] == round(rows[0.5].saved * rows[0.5].tokens)
    assert "memory knn skipping k=5 temperature=1 share=0.5, exact search" in rows[0.5].describe()


def test_a_model_generates_with_it(knn):
    lm = attach(tiny_model("llama"), SkippingMemory(knn, share=0.5))
    ask = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
    prompt = tiny_tokens(2, 4)
    made = lm.generate(prompt, **ask, return_dict_in_generate=True)
    stats = made.past_key_values.stats()
    assert stats["steps"] == 2 * 9
    assert 0 < stats["searches"] < 18
    beams = lm.generate(prompt, **ask, num_beams=3)
    assert torch.equal(beams[:, :4], prompt)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda knn: SkippingMemory(knn, share=1.2), "share must lie between 0 and 1, got 1.2"),
        (lambda knn: SkippingMemory(knn, history=-1), "history must be at least 0, got -1"),
        (lambda knn: SkippingMemory(LocalMemory()), "LocalMemory has one"),
        (lambda knn: SkippingMemory(knn).init_state(0), "rows must be at least 1, got 0"),
    ],
)
def test_mistakes(knn, make, message):
    with pytest.raises(InputError, match=message):
        make(knn)


def test_other_rows_are_refused(knn):
    memory, tokens = SkippingMemory(knn), tiny_tokens(2, 1)
    state = memory.init_state(3)
    with pytest.raises(InputError, match="3 rows of the state, got 2"):
        memory.observe(tokens, queries_for(tokens), state)
    with pytest.raises(InputError, match="3 rows of the state, got 2"):
        memory.read(queries_for(tokens)[:, 0], state)
