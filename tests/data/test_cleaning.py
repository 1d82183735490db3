"""Stages of text preparation beyond the recorded ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import CorruptStoreError, InputError
from memlm.data.bpe_codes import BpeCodes, read_codes
from memlm.data.cleaning import (
    detach_marks,
    merge_short,
    paragraphs,
    prepare,
    replace_patterns,
    split_sentences,
)


@given(st.text(alphabet="ab.,'\"-! ", max_size=40))
@settings(max_examples=60, deadline=None)
def test_marks_lose_nothing(line):
    found = detach_marks(line)
    assert found.replace(" ", "") == line.replace(" ", "")
    assert detach_marks(found) == found


def test_last_paragraphs_are_kept():
    lines = ["a b c d e", "", "", "f g"]
    assert list(paragraphs(lines)) == [["a b c d e"], ["f g"]]
    with pytest.raises(InputError, match="two blank lines in a row"):
        list(paragraphs(lines, legacy=True))


@given(st.lists(st.integers(1, 30), max_size=10))
@settings(max_examples=60, deadline=None)
def test_short_sentences_find_company(lengths):
    sentences = [" ".join(["word"] * length) for length in lengths]
    merged = merge_short(sentences)
    assert " ".join(merged) == " ".join(sentences)
    if len(merged) > 1:
        assert min(len(one.split()) for one in merged) >= 5


def test_patterns():
    line = "see www.example.com or mail me@example.de about notes.txt and e.g. well-known 3.14"
    assert replace_patterns(line) == (
        "see <url> or mail <email> about <file> and e.g. well - known 3.14"
    )


def test_sentences():
    text = "he came . did he see ? yes ! ..."
    assert split_sentences(text) == ["he came .", "did he see ?", "yes !"]


def test_repetitions_are_dropped():
    line = "this line has more than fifty letters in it and is read twice in the same corpus."
    assert list(prepare([line, f"{line}\n"])) == [[detach_marks(line)]]


def test_codes_are_checked(tmp_path):
    with pytest.raises(InputError, match="every pair of the codes must stand there once"):
        BpeCodes([("a", "b"), ("a", "b")])
    (tmp_path / "codes").write_text("a b 3\na b\n")
    with pytest.raises(CorruptStoreError, match="line 2 of"):
        read_codes(tmp_path / "codes")
    assert BpeCodes([("a", "b</w>")]).apply("ab aab <url>") == "ab a@@ ab <url>"
