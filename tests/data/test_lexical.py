"""Grouping of similar text: neighbours, chain, overlap and files."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.lexical import (
    find_neighbours,
    greedy_chain,
    overlap,
    read_neighbours,
    read_order,
    write_order,
)

TOPICS, EACH, LENGTH = 6, 4, 30


@pytest.fixture
def blocks():
    """Blocks of six topics, shuffled; each topic has rare tokens of its own among common ones."""
    draw = np.random.default_rng(0)
    topic = np.arange(TOPICS * EACH) % TOPICS
    rare = 100 + 20 * topic[:, None] + draw.integers(0, 8, (len(topic), LENGTH))
    common = draw.integers(0, 40, (len(topic), LENGTH))
    return list(np.where(draw.random((len(topic), LENGTH)) < 0.5, rare, common))


def test_neighbours_are_of_the_same_topic(blocks):
    neighbours = find_neighbours(blocks, k=EACH - 1)
    own = np.arange(len(blocks))[:, None]
    assert (neighbours % TOPICS == own % TOPICS).all()
    assert (neighbours != own).all()


def test_shards_are_parts_of_the_whole(blocks):
    whole = find_neighbours(blocks, k=5)
    parts = [find_neighbours(blocks, k=5, shard=shard, shards=5) for shard in range(5)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_blocks_that_share_nothing_have_no_neighbours():
    neighbours = find_neighbours([np.array([1, 2]), np.array([1, 3]), np.array([7, 8])], k=2)
    assert neighbours.tolist() == [[1, -1], [0, -1], [-1, -1]]


def test_only_the_rarest_tokens_are_looked_up():
    blocks = [np.array([1, 2]), np.array([1, 9]), np.array([2, 9]), np.array([1, 7])]
    assert find_neighbours(blocks, k=3, query_terms=1)[0].tolist() == [2, -1, -1]
    assert sorted(find_neighbours(blocks, k=3)[0]) == [1, 2, 3]


def test_the_chain_brings_similar_text_together(blocks):
    chain = greedy_chain(find_neighbours(blocks))
    assert overlap(blocks, chain, EACH) > 1.5 * overlap(blocks, np.arange(len(blocks)), EACH)
    assert np.array_equal(chain, greedy_chain(find_neighbours(blocks)))
    assert not np.array_equal(chain, greedy_chain(find_neighbours(blocks), seed=2))


@given(st.data())
def test_a_chain_is_a_permutation(data):
    count = data.draw(st.integers(1, 25))
    row = st.lists(st.integers(-1, count - 1), max_size=6)
    neighbours = data.draw(st.lists(row, min_size=count, max_size=count))
    assert sorted(greedy_chain(neighbours)) == list(range(count))


def test_overlap_is_the_share_of_rare_tokens_found_in_the_group():
    blocks = [np.array([1, 1, 2]), np.array([1, 3, 4]), np.array([5, 6, 7]), np.array([5, 6, 7])]
    assert overlap(blocks, np.arange(4), 2) == (2 + 1 + 3 + 3) / 12
    assert overlap(blocks, np.array([0, 2, 1, 3]), 2) == 0


def test_order_goes_through_a_file(tmp_path):
    write_order(tmp_path / "order.json", np.array([2, 0, 1]))
    assert json.loads((tmp_path / "order.json").read_text()) == [2, 0, 1]
    assert read_order(tmp_path / "order.json", 3).tolist() == [2, 0, 1]
    with pytest.raises(InputError, match="every block from 0 to 3 once, but has 3 entries"):
        read_order(tmp_path / "order.json", 4)
    for content in ("3", '["a"]', "[[0]]", "0, 1"):
        (tmp_path / "order.json").write_text(content)
        with pytest.raises(InputError, match="must be a JSON list of the numbers of 2 blocks"):
            read_order(tmp_path / "order.json", 2)


def test_results_must_be_complete(tmp_path):
    (tmp_path / "shard0.json").write_text('[{"id": 1, "retrieval": ["1", "0"]}]')
    with pytest.raises(InputError, match="are all shards given"):
        read_neighbours([tmp_path / "shard0.json"])
    (tmp_path / "shard1.json").write_text('[{"id": 0, "retrieval": ["0", "1"]}]')
    assert read_neighbours([tmp_path / "shard0.json", tmp_path / "shard1.json"]) == [[1], [0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda blocks: find_neighbours(blocks[:1]), "at least two blocks, got 1"),
        (lambda blocks: find_neighbours(blocks, k=0), "k must be at least 1, got 0"),
        (lambda blocks: find_neighbours(blocks, query_terms=0), "query_terms must be at least 1"),
        (
            lambda blocks: find_neighbours(blocks, shard=2, shards=2),
            r"shard must lie between 0 and 1 \(shards=2\), got 2",
        ),
        (lambda blocks: greedy_chain([]), "at least one block, got none"),
        (lambda blocks: greedy_chain([[1], [2]]), "numbers of the 2 blocks, or -1 for none"),
        (lambda blocks: overlap(blocks, np.arange(3), 1), "at least 2 blocks, got 1"),
    ],
)
def test_bad_input(blocks, call, message):
    with pytest.raises(InputError, match=message):
        call(blocks)
