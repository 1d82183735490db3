"""Dictionaries and binarised text of fairseq: read, written back, and refused when damaged."""

import numpy as np
import pytest

from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.binarised import Lines, read_corpus, read_lines, write_lines
from memlm.formats.dictionary import read_dictionary

TEXT = "the 9\ncat 5\nsat 3\nmadeupword0000 0\n"


@pytest.fixture
def words(tmp_path):
    (tmp_path / "dict.txt").write_text(TEXT)
    return read_dictionary(tmp_path)


def test_ids_begin_after_the_special_words(words):
    assert words.words[:5] == ("<s>", "<pad>", "</s>", "<unk>", "the")
    assert words.counts.tolist() == [0, 0, 0, 0, 9, 5, 3, 0]
    assert words.encode("  the dog \t sat\n") == [4, 3, 6, 2]
    assert words.encode("") == [2]


def test_the_tokenizer_has_the_same_ids(words):
    tokenizer = words.tokenizer()
    assert tokenizer("the dog sat", add_special_tokens=False)["input_ids"] == [4, 3, 6]
    assert tokenizer.pad_token_id == 1
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.decode([4, 5]) == "the cat"


def test_lines_become_documents_after_one_end_token(words):
    corpus = words.corpus(["the cat", "", "sat"])
    assert corpus.tokens.tolist() == [2, 4, 5, 2, 2, 6, 2]
    assert corpus.offsets.tolist() == [0, 4, 5, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [("the\n", "line 1 of .* must be a word"), ("the 3\ncat five\n", "line 2 of")],
)
def test_damaged_dictionaries(tmp_path, text, message):
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(CorruptStoreError, match=message):
        read_dictionary(tmp_path)


def test_a_word_twice_and_a_missing_file(tmp_path):
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        read_dictionary(tmp_path)
    (tmp_path / "dict.txt").write_text("the 3\nthe 2\n")
    with pytest.raises(InputError, match="'the' does not"):
        read_dictionary(tmp_path)


@pytest.mark.parametrize("kind", ["u1", "i1", "<i2", "<u2", "<i4", "<i8"])
def test_binarised_text_comes_back(tmp_path, kind):
    lines = Lines(np.array([4, 5, 2, 2, 6, 2], kind), np.array([3, 1, 2], np.int32))
    write_lines(tmp_path / "train", lines)
    for name in ("train", "train.bin", "train.idx"):
        got = read_lines(tmp_path / name)
        assert got.tokens.dtype == np.dtype(kind)
        assert got.tokens.tolist() == lines.tokens.tolist()
        assert got.sizes.tolist() == lines.sizes.tolist()
    corpus = read_corpus(tmp_path / "train")
    assert corpus.tokens.tolist() == [2, 4, 5, 2, 2, 6, 2]
    assert corpus.documents == 3


def test_damaged_binarised_text(tmp_path):
    write_lines(tmp_path / "train", Lines(np.arange(6, dtype=np.int32), np.array([2, 4])))
    index, data = tmp_path / "train.idx", tmp_path / "train.bin"
    whole_index, whole_data = index.read_bytes(), data.read_bytes()
    data.write_bytes(whole_data[:-1])
    with pytest.raises(CorruptStoreError, match="must hold the 24 bytes of the lines"):
        read_lines(tmp_path / "train")
    data.write_bytes(whole_data)
    for changed, message in (
        (whole_index[:-1], "must have 50 bytes for 2 lines, got 49"),
        (b"", "must begin with fairseq's mark"),
        (b"TNTIDX\x00\x00" + whole_index[8:], "dataset-impl mmap"),
        (whole_index[:17] + b"\x63" + whole_index[18:], "a known type of numbers"),
    ):
        index.write_bytes(changed)
        with pytest.raises(CorruptStoreError, match=message):
            read_lines(tmp_path / "train")
    index.unlink()
    with pytest.raises(CorruptStoreError, match="must exist but does not"):
        read_lines(tmp_path / "train")


def test_numbers_and_nothing_are_no_text(tmp_path):
    write_lines(tmp_path / "a", Lines(np.zeros(2), np.array([2])))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="must hold ids, but its numbers are float64"):
        read_corpus(tmp_path / "a")
    write_lines(tmp_path / "b", Lines(np.zeros(0, np.int32), np.zeros(0, np.int32)))
    with pytest.raises(InputError, match="at least one line"):
        read_corpus(tmp_path / "b")
