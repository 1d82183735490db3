"""Masks and blocks: shares, ends, words."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.masking import Masker, Masking, collate_masked
from memlm.data.sentence_blocks import cut_blocks

VOCAB, MASK = 100, 99


@given(st.integers(1, 60), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_masked_sample(length, number):
    tokens = np.random.default_rng(number).integers(7, MASK, length)
    masked = Masker(VOCAB, MASK, Masking())(tokens, seed=1, epoch=2, number=number)
    chosen = masked.labels != -100
    assert np.floor(0.15 * length) <= chosen.sum() <= np.ceil(0.15 * length)
    assert (masked.labels[chosen] == tokens[chosen]).all()
    assert (masked.tokens[~chosen] == tokens[~chosen]).all()
    again = Masker(VOCAB, MASK, Masking())(tokens, seed=1, epoch=2, number=number)
    assert (again.tokens == masked.tokens).all()


def test_shares():
    tokens = np.full(200_000, 8)
    masked = Masker(VOCAB, MASK, Masking())(tokens, seed=1, epoch=1, number=1)
    chosen = masked.labels != -100
    source = masked.tokens[chosen]
    total = chosen.sum()
    for share, count in ((0.8, (source == MASK).sum()), (0.1, (source == 8).sum())):
        # random tokens are the mask or token 8 itself now and then
        expected = share + 0.1 / (VOCAB - 7)
        assert abs(count / total - expected) < 3 * (expected * (1 - expected) / total) ** 0.5
    assert source.min() >= 7


def test_whole_words():
    ends = np.zeros(VOCAB, dtype=bool)
    ends[::2] = True
    tokens = np.array([11, 13, 12, 14, 15, 16, 17])  # words: 11 13 12 | 14 | 15 16 | 17
    words = [(0, 3), (3, 4), (4, 6), (6, 7)]
    masker = Masker(VOCAB, MASK, Masking(mask_prob=0.5, whole_words=True), ends_word=ends)
    for number in range(20):
        chosen = masker(tokens, seed=1, epoch=1, number=number).labels != -100
        assert sum(chosen[begin] for begin, _ in words) == 2
        assert all(len(set(chosen[begin:end])) == 1 for begin, end in words)


def test_collated():
    samples = [
        {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 3, -100])},
        {"input_ids": torch.tensor([8]), "labels": torch.tensor([-100])},
    ]
    batch = collate_masked(samples, pad_token=1, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["labels"][1].tolist() == [-100] * 4


@given(
    st.lists(st.integers(1, 20), max_size=30),
    st.integers(1, 25),
    st.sampled_from(["none", "complete", "eos"]),
)
@settings(max_examples=60, deadline=None)
def test_blocks_hold_everything_once(lengths, size, mode):
    slices = cut_blocks(np.array(lengths, np.int64), size, mode).slices
    assert [token for begin, end in slices for token in range(begin, end)] == list(
        range(sum(lengths))
    )
    if mode == "none":
        assert all(end - begin <= size for begin, end in slices)


def test_bad_blocks():
    with pytest.raises(InputError, match="size must be at least 1"):
        cut_blocks(np.array([1]), 0)
    with pytest.raises(InputError, match="mode must be"):
        cut_blocks(np.array([1]), 4, "words")
