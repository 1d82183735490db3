"""Blocks: every token once per epoch, an order of their own, exact counts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.training.blocks import HeldOutBlocks, Stream, TrainingBlocks, collate, pack

BEGIN = 0


def corpus_of(*documents, begin=True, end=True):
    rows = [[BEGIN] * begin + list(document) + [BEGIN] * end for document in documents]
    offsets = np.cumsum([0, *map(len, rows)])
    return TokenCorpus.from_tokens(
        np.concatenate([np.array(row, dtype=np.int64) for row in rows]),
        offsets,
        begin_token=BEGIN if begin else None,
    )


def test_the_end_of_one_document_begins_the_next():
    stream = pack(corpus_of([1, 2], [3], [4, 5]))
    assert stream.tokens.tolist() == [0, 1, 2, 0, 3, 0, 4, 5, 0]
    assert stream.scored.tolist() == [False] + [True] * 8


def test_without_end_tokens_begin_tokens_stay_and_are_not_scored():
    stream = pack(corpus_of([1, 2], [3], end=False))
    assert stream.tokens.tolist() == [0, 1, 2, 0, 3]
    assert stream.scored.tolist() == [False, True, True, False, True]


def test_a_corpus_without_begin_tokens_and_empty_documents_is_taken_as_it_is():
    corpus = TokenCorpus.from_tokens([7, 8, 9], [0, 0, 2, 2, 3])
    stream = pack(corpus)
    assert stream.tokens.tolist() == [7, 8, 9]
    assert stream.scored.all()


streams = st.integers(5, 120).flatmap(
    lambda n: st.lists(st.booleans(), min_size=n, max_size=n).map(
        lambda scored: Stream(np.arange(n, dtype=np.int32), np.array(scored))
    )
)


@settings(deadline=None)
@given(stream=streams, length=st.integers(2, 9), seed=st.integers(0, 5), epochs=st.integers(1, 3))
def test_every_epoch_predicts_tokens_at_most_once_and_counts_exactly(stream, length, seed, epochs):
    if len(stream.tokens) <= length:
        return
    data = TrainingBlocks(stream, length, items=10**12, seed=seed)
    assert data.blocks >= max(1, (len(stream.tokens) - 1) // length - 1)
    seen = []
    for epoch in range(epochs):
        rows = [data[epoch * data.blocks + place] for place in range(data.blocks)]
        labels = collate(rows)["shift_labels"]
        inputs = collate(rows)["input_ids"]
        scored = labels != -100
        assert bool((labels[scored] == inputs[scored] + 1).all())  # tokens are 0, 1, 2, ...
        assert max(Counter(inputs.flatten().tolist()).values()) == 1
        assert stream.scored[(inputs + 1).numpy()].tolist() == scored.tolist()
        seen.append(int(scored.sum()))
        assert data.targets((epoch + 1) * data.blocks) == sum(seen)
    half = data.blocks // 2
    assert data.targets(half) == sum(int((data[i]["labels"] != -100).sum()) for i in range(half))


def test_the_order_depends_on_seed_and_epoch_only():
    stream = Stream(np.arange(400, dtype=np.int32), np.ones(400, dtype=bool))

    def order(seed, items):
        data = TrainingBlocks(stream, 8, items=200, seed=seed)
        return [int(data[item]["input_ids"][0]) for item in items]

    assert order(1, range(100)) == order(1, range(100))
    assert order(1, [70, 3, 48]) == [order(1, range(100))[item] for item in (70, 3, 48)]
    assert order(1, range(48)) != order(2, range(48))
    first, second = order(1, range(48)), order(1, range(48, 96))
    assert first != second
    assert sorted(first) != sorted(second)  # cuts begin elsewhere


def test_a_corpus_that_fills_exactly_one_block_is_enough():
    stream = Stream(np.arange(9, dtype=np.int32), np.ones(9, dtype=bool))
    data = TrainingBlocks(stream, 8, items=3, seed=0)
    assert [data[item]["shift_labels"].tolist() for item in range(3)] == [list(range(1, 9))] * 3
    assert data.targets(3) == 24


def test_a_corpus_smaller_than_a_block_is_refused():
    stream = Stream(np.arange(8, dtype=np.int32), np.ones(8, dtype=bool))
    with pytest.raises(InputError, match="at least one block of 8 tokens"):
        TrainingBlocks(stream, 8, items=1, seed=0)


@settings(deadline=None)
@given(stream=streams, length=st.integers(2, 9))
def test_held_out_blocks_predict_every_scored_token_once(stream, length):
    if not stream.scored[1:].any():
        with pytest.raises(InputError, match="at least two tokens"):
            HeldOutBlocks(stream, length)
        return
    data = HeldOutBlocks(stream, length)
    labels = collate(list(data))["shift_labels"].flatten()
    found = labels[labels != -100]
    assert found.tolist() == stream.tokens[1:][stream.scored[1:]].tolist()
    assert data.targets == len(found)
