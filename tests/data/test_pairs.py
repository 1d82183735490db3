"""Pairs: files, batches, and what is refused."""

import json
import lzma

import numpy as np
import pytest

from memlm.core.errors import InputError
from memlm.data.pairs import Pair, PairCorpus, read_pairs, tokenize_pairs

PAIRS = [Pair("the cat", "the dog sat"), Pair("a story", "it was told")]


def test_lines_and_records_are_read(tmp_path):
    text = "the cat\tthe dog sat\tmore\n\na story\tit was told\n"
    (tmp_path / "pairs.tsv").write_text(text)
    with lzma.open(tmp_path / "pairs.tsv.xz", "wt") as file:
        file.write(text)
    rows = [{"source": a, "target": b} for a, b in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    nested = [{"translation": {"en": a, "ro": b}} for a, b in PAIRS]
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, nested)))
    for name in ("pairs.tsv", "pairs.tsv.xz", "pairs.jsonl"):
        assert read_pairs(tmp_path / name) == PAIRS
    assert read_pairs(tmp_path / "nested.jsonl", source="en", target="ro", limit=1) == PAIRS[:1]
    with pytest.raises(InputError, match="texts under 'source' and 'target', got"):
        read_pairs(tmp_path / "nested.jsonl")
    (tmp_path / "plain.txt").write_text("no tab\n")
    with pytest.raises(InputError, match="a source, a tab and a target"):
        read_pairs(tmp_path / "plain.txt")
    (tmp_path / "empty.tsv").write_text("\n")
    with pytest.raises(InputError, match="at least one pair"):
        read_pairs(tmp_path / "empty.tsv")


def corpus(count=40, seed=0):
    draw = np.random.default_rng(seed)
    sides = [
        [draw.integers(3, 60, length) for length in draw.integers(1, 12, count)] for _ in range(2)
    ]
    return PairCorpus.from_tokens(*sides), sides


def test_every_pair_is_in_one_batch_of_bounded_size():
    pairs, (sources, targets) = corpus()
    seen = []
    for batch, numbers in pairs.batches(64, slice(5, 40)):
        rows, size = len(numbers), batch.input_ids.shape[1] + batch.labels.shape[1]
        assert rows == 1 or rows * size <= 64
        for row, number in enumerate(numbers.tolist()):
            real = batch.attention_mask[row].bool()
            assert batch.input_ids[row][real].tolist() == sources[number].tolist()
            labels = batch.labels[row]
            assert labels[labels != -100].tolist() == targets[number].tolist()
        seen += numbers.tolist()
    assert sorted(seen) == list(range(5, 40))


def test_tokenised_pairs_are_cut(tokenizer):
    pairs = tokenize_pairs(PAIRS, tokenizer, source_length=1, target_length=2)
    assert np.diff(pairs.sources.offsets).tolist() == [1, 1]
    assert np.diff(pairs.targets.offsets).tolist() == [2, 2]
    assert pairs.hash != tokenize_pairs(PAIRS, tokenizer).hash


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(InputError, match="every source must have a target, got 2 sources and 1"):
        PairCorpus.from_tokens([[1], [2]], [[3]])
    with pytest.raises(InputError, match="no target may be empty, but that of pair 1 is"):
        PairCorpus.from_tokens([[1], [2]], [[3], []])
    with pytest.raises(InputError, match="at least one pair"):
        PairCorpus.from_tokens([], [])
