"""The local memory offers exactly the past: never the future, the padding or another row."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index.stores import normal
from torch.testing import assert_close

from memlm.core.errors import InputError
from memlm.core.types import TokenMemory
from memlm.memory.local import LocalMemory

TOKENS = torch.randint(0, 9, (3, 12), generator=torch.Generator().manual_seed(1))
KEYS = normal(3, 12, 4, seed=2)


def seen(memory, length, tokens=TOKENS, keys=KEYS, valid=None):
    state = memory.init_state(len(tokens))
    valid = None if valid is None else valid[:, :length]
    return memory.observe(tokens[:, :length], keys[:, :length], state, valid)


def flat(candidates):
    """Per row the (id, token, score) of what is valid."""
    return [
        [(int(i), int(t), float(s)) for s, t, i, v in zip(*row, strict=True) if v]
        for row in zip(*candidates, strict=True)
    ]


def test_it_is_a_token_memory():
    assert isinstance(LocalMemory(), TokenMemory)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_candidates_are_the_last_pairs_of_the_own_past(metric, length, size):
    memory = LocalMemory(size=size, temperature=2.0, metric=metric)
    query = KEYS[:, length - 1]
    candidates, _ = memory.read(query, seen(memory, length))
    for row, found in enumerate(flat(candidates)):
        expected = []
        for i in range(max(0, length - 1 - size), length - 1):
            key, q = KEYS[row, i], query[row]
            score = {
                "ip": q @ key,
                "l2": -((q - key) ** 2).sum(),
                "cosine": q @ key / q.norm() / key.norm(),
            }[metric]
            expected.append((i, int(TOKENS[row, i + 1]), float(score) / 2))
        assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
        assert [pair[2] for pair in found] == pytest.approx(
            [pair[2] for pair in expected], abs=1e-5
        )


def test_no_past_no_candidate():
    memory = LocalMemory()
    for length in (0, 1):
        state = seen(memory, length)
        candidates, _ = memory.read(KEYS[:, 0], state)
        assert not candidates.valid.any()
        partial, _ = memory.score(KEYS[:, 0], TOKENS[:, 0], state)
        assert torch.isneginf(partial.lse).all()
        assert torch.isneginf(partial.target_lse).all()
        assert memory.stats(state)["off"]
    assert memory.stats(seen(memory, 5)) == {
        "entries": 4,
        "searches_per_position": 0,
        "off": False,
    }


@settings(deadline=None, max_examples=40)
@given(cuts=st.lists(st.integers(1, 11), max_size=5), length=st.integers(2, 12))
def test_observing_in_pieces_is_observing_at_once(cuts, length):
    memory = LocalMemory(size=6)
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    state = memory.init_state(3)
    for begin, end in itertools.pairwise(edges):
        state = memory.observe(TOKENS[:, begin:end], KEYS[:, begin:end], state)
    for a, b in zip(state.columns, seen(memory, length).columns, strict=True):
        assert_close(a, b)


def test_the_future_does_not_matter():
    memory = LocalMemory()
    tokens, keys = TOKENS.clone(), KEYS.clone()
    tokens[:, 7:], keys[:, 7:] = 0, 9.0
    a, _ = memory.read(KEYS[:, 6], seen(memory, 7))
    b, _ = memory.read(KEYS[:, 6], seen(memory, 7, tokens, keys))
    assert flat(a) == flat(b)


@pytest.mark.parametrize("length", [0, 1, 6, 12])
def test_cropping_is_never_having_seen_the_rest(length):
    memory = LocalMemory(size=3)
    cropped = memory.crop(seen(memory, 12), length)
    expected = seen(memory, length) if length else memory.init_state(3)
    a, _ = memory.read(KEYS[:, 5], cropped)
    b, _ = memory.read(KEYS[:, 5], expected)
    assert flat(a) == flat(b)
    # and the text can go on from there
    on = memory.observe(TOKENS[:, length:], KEYS[:, length:], cropped)
    assert_close(on.keys, KEYS)
    assert_close(on.tokens, TOKENS)


def test_rows_are_reordered_and_copied_with_their_past():
    memory = LocalMemory()
    index = torch.tensor([2, 0, 0, 1])
    chosen = memory.select_rows(seen(memory, 8), index)
    expected = seen(memory, 8, TOKENS[index], KEYS[index])
    a, _ = memory.read(KEYS[index, 7], chosen)
    b, _ = memory.read(KEYS[index, 7], expected)
    assert flat(a) == flat(b)


def test_left_padding_changes_nothing():
    memory = LocalMemory(size=50)
    pad = torch.zeros(3, 4, dtype=torch.int64)
    tokens = torch.cat([pad, TOKENS], 1)
    keys = torch.cat([normal(3, 4, 4, seed=9), KEYS], 1)
    valid = torch.cat([pad.bool(), torch.ones_like(TOKENS).bool()], 1)
    padded, _ = memory.read(KEYS[:, 11], seen(memory, 16, tokens, keys, valid))
    plain, _ = memory.read(KEYS[:, 11], seen(memory, 12))
    shifted = [[(i - 4, token, score) for i, token, score in row] for row in flat(padded)]
    assert shifted == flat(plain)


def test_states_are_not_changed_in_place():
    memory = LocalMemory()
    state = seen(memory, 6)
    before = [part.clone() for part in state.columns]
    memory.observe(TOKENS[:, 6:], KEYS[:, 6:], state)
    memory.crop(state, 2)
    memory.select_rows(state, torch.tensor([1]))
    memory.read(KEYS[:, 5], state)
    for a, b in zip(before, state.columns, strict=True):
        assert_close(a, b)


def test_a_repeated_text_is_predicted():
    memory = LocalMemory(temperature=0.01, metric="l2")
    keys = KEYS[:, :6].repeat(1, 2, 1)
    tokens = TOKENS[:, :6].repeat(1, 2)
    partial, _ = memory.score(keys[:, 8], tokens[:, 9], seen(memory, 9, tokens, keys))
    assert_close(partial.target_lse - partial.lse, torch.zeros(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LocalMemory(size=0), "size must be at least 1, got 0"),
        (lambda: LocalMemory(temperature=0), "above 0, got 0"),
        (lambda: LocalMemory(metric="dot"), "metric must be one of"),
        (lambda: LocalMemory().init_state(0), "rows must be at least 1"),
        (lambda: seen(LocalMemory(), 12, TOKENS[:2]), "must fit the state of 2 rows"),
        (
            lambda: LocalMemory().observe(TOKENS, KEYS[..., :2], seen(LocalMemory(), 3)),
            "3 rows and 4 dimensions",
        ),
        (lambda: LocalMemory().crop(seen(LocalMemory(), 3), 4), "between 0 and 3, got 4"),
        (lambda: LocalMemory().read(KEYS[:2, 0], seen(LocalMemory(), 3)), r"must be \(3, 4\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_settings_round_trip():
    memory = LocalMemory(size=7, temperature=3.0, metric="cosine")
    assert LocalMemory.from_dict(memory.to_dict()) == memory
    assert memory.describe() == {
        "memory": "local",
        "size": 7,
        "temperature": 3.0,
        "metric": "cosine",
    }
