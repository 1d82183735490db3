"""Batches: every window once, within the size, and exactly the tokens of its window."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.batches import IGNORED, make_batch, plan_batches
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows

several = settings(max_examples=60, deadline=None)


@st.composite
def tables(draw):
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda x: max(x) > 1))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    corpus = TokenCorpus.from_tokens(np.arange(offsets[-1]) + 7, offsets)
    length = draw(st.integers(1, 12))
    stride = draw(st.integers(1, length))
    return corpus, SlidingWindows(length=length, stride=stride).table(corpus)


@several
@given(made=tables(), batch_tokens=st.integers(1, 60), data=st.data())
def test_batches_cover_each_window_of_the_span_once(made, batch_tokens, data):
    _, table = made
    low = data.draw(st.integers(0, table.windows))
    high = data.draw(st.integers(low, table.windows))
    batches = plan_batches(table, batch_tokens=batch_tokens, span=slice(low, high))
    assert sorted(np.concatenate([*batches, []]).tolist()) == list(range(low, high))
    widths = [table.inputs[batch] for batch in batches]
    assert all(len(w) * w.max() <= batch_tokens or len(w) == 1 for w in widths)
    lengths = np.concatenate([*widths, []])
    assert (np.diff(lengths) <= 0).all()
    again = plan_batches(table, batch_tokens=batch_tokens, span=slice(low, high))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))


@several
@given(made=tables(), batch_tokens=st.integers(1, 60))
def test_a_batch_holds_the_tokens_of_its_windows(made, batch_tokens):
    corpus, table = made
    for numbers in plan_batches(table, batch_tokens=batch_tokens):
        batch = make_batch(corpus, table, numbers, pad=3)
        assert batch.windows.tolist() == numbers.tolist()
        assert batch.input_ids.shape == batch.targets.shape
        assert batch.input_ids.shape[1] == table.inputs[numbers].max()
        for row, number in enumerate(numbers):
            begin, end, first, _ = (int(field[number]) for field in table)
            read = batch.input_ids[row].tolist()
            assert read[: end - 1 - begin] == corpus.tokens[begin : end - 1].tolist()
            assert set(read[end - 1 - begin :]) <= {3}
            asked = batch.targets[row].tolist()
            scored = [place for place, token in enumerate(asked) if token != IGNORED]
            assert scored == list(range(first - 1 - begin, end - 1 - begin))
            assert [asked[place] for place in scored] == corpus.tokens[first:end].tolist()


def test_equal_lengths_keep_their_order():
    corpus = TokenCorpus.from_tokens(range(40))
    table = SlidingWindows(length=4, stride=4).table(corpus)
    batches = plan_batches(table, batch_tokens=8)
    assert np.concatenate(batches).tolist() == list(range(table.windows))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, t: plan_batches(t, batch_tokens=0), "batch_tokens must be at least 1, got 0"),
        (lambda c, t: plan_batches(t, batch_tokens=8, span=slice(0, 4, 2)), "must have step 1"),
        (lambda c, t: make_batch(c, t, np.array([], dtype=np.int64)), "at least one window"),
    ],
)
def test_bad_input_is_named(call, message):
    corpus = TokenCorpus.from_tokens(range(9))
    with pytest.raises(InputError, match=message):
        call(corpus, SlidingWindows(length=4, stride=2).table(corpus))
