"""BM25 of many queries against its formula, one pair of blocks after another."""

from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.data import bm25
from memlm.data.bm25 import BlockScores

TERMS = 6  # more than any query here has


def oracle(blocks, query, *, query_terms, fewest, k1=0.9, b=0.4):
    """Scores of all blocks in float64, a token and a block at a time."""
    mean = sum(len(block) for block in blocks) / len(blocks)
    frequency = {int(token): sum(token in block for block in blocks) for token in set(query)}
    rarest = sorted((count, token) for token, count in frequency.items() if count >= fewest)
    scores = np.zeros(len(blocks))
    for count, token in rarest[:query_terms]:
        idf = log(1 + (len(blocks) - count + 0.5) / (count + 0.5))
        for number, block in enumerate(blocks):
            times = np.sum(block == token)
            scores[number] += idf * times / (times + k1 * (1 - b + b * len(block) / mean))
    return scores


def zipf(draw, count, most=400):
    """Blocks with frequent and rare tokens, of different lengths; the last repeats the first."""
    blocks = [np.minimum(draw.zipf(1.3, draw.integers(3, 40)), most) for _ in range(count - 1)]
    return [*blocks, blocks[0]]


def together(found):
    scores, numbers = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(numbers)


block_lists = st.lists(
    st.lists(st.integers(0, 12), min_size=1, max_size=9).map(np.array), min_size=2, max_size=12
)


@settings(deadline=None)  # bm25s is imported by the first
@given(blocks=block_lists, k=st.integers(1, 14), query_terms=st.integers(1, 9), data=st.data())
def test_the_best_blocks_are_those_of_the_formula(blocks, k, query_terms, data):
    query = np.array(data.draw(st.lists(st.integers(0, 14), max_size=9)), np.int64)
    fewest = data.draw(st.integers(1, 3))
    search = BlockScores(blocks).search([query], k, query_terms=query_terms, fewest=fewest)
    scores, numbers = together(search)
    expected = oracle(blocks, query, query_terms=query_terms, fewest=fewest)
    found = numbers[0][numbers[0] >= 0]
    assert len(found) == min(k, np.sum(expected > 0))
    np.testing.assert_allclose(scores[0, : len(found)], expected[found], rtol=1e-5)
    np.testing.assert_allclose(expected[found], -np.sort(-expected)[: len(found)], rtol=1e-5)
    assert np.isneginf(scores[0, len(found) :]).all()


@pytest.mark.parametrize("frequent", [0.0, 1.0])
@pytest.mark.parametrize("sums", [1, 1000])
def test_no_way_to_add_changes_the_answer(monkeypatch, frequent, sums):
    monkeypatch.setattr(bm25, "_FREQUENT", frequent)
    monkeypatch.setattr(bm25, "_SUMS", sums)
    blocks = zipf(np.random.default_rng(1), 150)
    index = BlockScores(blocks)
    everything = np.arange(len(blocks))
    scores, numbers = together(index.search(blocks, 7, query_terms=20, fewest=2))
    for query in range(0, len(blocks), 30):
        block = blocks[query]
        exact = oracle(blocks, block, query_terms=20, fewest=2)
        np.testing.assert_allclose(scores[query], exact[numbers[query]], rtol=1e-5)
        # all of them, added up exactly
        summed, order = together(index.search([block], len(blocks), query_terms=20, fewest=2))
        assert np.array_equal(numbers[query], order[0, :7])
        assert np.array_equal(scores[query], summed[0, :7])
    assert np.array_equal(
        index.of(blocks[3], everything, query_terms=9),
        index.of(blocks[3], everything[::-1], query_terms=9)[::-1],
    )


def test_many_queries_of_few_blocks_are_answered_in_parts(monkeypatch):
    monkeypatch.setattr(bm25, "_SUMS", 1000)
    blocks = [np.arange(100), np.arange(100, 200)]  # 200 tokens, all of them frequent
    parts = BlockScores(blocks).search([blocks[1]] * 12, 1, query_terms=TERMS)
    assert [part.numbers.tolist() for part in parts] == [[[1]] * 5, [[1]] * 5, [[1]] * 2]


def test_an_order_of_blocks_only_renumbers_them():
    draw = np.random.default_rng(2)
    blocks = zipf(draw, 200)
    order = draw.permutation(len(blocks))
    there = BlockScores([blocks[number] for number in order])
    here = BlockScores(blocks)
    for query in blocks[:20]:
        scores = here.of(query, order, query_terms=30)
        assert np.array_equal(scores, there.of(query, np.arange(len(blocks)), query_terms=30))


def test_equal_blocks_go_by_number():
    blocks = [np.array([5, 6]), np.array([1, 2, 3]), np.array([7])] * 50
    _, numbers = together(BlockScores(blocks).search([np.array([2, 1])], 4, query_terms=TERMS))
    assert numbers.tolist() == [[1, 4, 7, 10]]


def test_blocks_that_differ_by_rounding_alone_are_equal():
    """All hold the same tokens, each as often as another of them: only float32 tells them apart."""
    draw = np.random.default_rng(3)
    times = np.arange(1, 41)
    blocks = [np.repeat(np.arange(40), draw.permutation(times)) for _ in range(300)]
    index = BlockScores(blocks)
    _, numbers = together(index.search([np.arange(40)], 9, query_terms=40))
    assert numbers.tolist() == [list(range(9))]


def test_what_is_left_out_makes_room_for_others():
    blocks = [np.array([1, 2]), np.array([1, 2]), np.array([1, 9]), np.array([1]), np.array([8])]
    index = BlockScores(blocks)
    queries, dead = [blocks[0], blocks[2]], np.array([0, 0, 0, 1, 0], bool)
    _, numbers = together(
        index.search(queries, 3, query_terms=TERMS, without=[slice(0, 1), slice(2, 3)], dead=dead)
    )
    assert numbers.tolist() == [[1, 2, -1], [0, 1, -1]]


def test_unknown_tokens_and_empty_queries_find_nothing():
    index = BlockScores([np.array([1, 2]), np.array([2, 3])])
    queries = [np.array([99]), np.array([], np.int64), np.array([-1, 3])]
    _, numbers = together(index.search(queries, 2, query_terms=TERMS))
    assert numbers.tolist() == [[-1, -1], [-1, -1], [1, -1]]
    assert not len(list(index.search([], 2, query_terms=TERMS)))
