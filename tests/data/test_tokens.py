"""Token corpora: what tokenize keeps, what the hash depends on, what is refused."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from memlm.core.errors import InputError
from memlm.data import tokens as module
from memlm.data.documents import Document
from memlm.data.tokens import TokenCorpus, tokenize

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "é": 5}


def tokenizer_of(**special):
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    words.enable_truncation(max_length=2)  # a setting of the file, which must not cut the text
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", model_max_length=4, **special
    )


@pytest.fixture
def documents():
    return [
        Document("one", "a b  é\n a b a"),
        Document("empty", ""),
        Document("two", "b unknown"),
    ]


def test_begin_and_end_tokens_surround_every_document(documents):
    corpus = tokenize(documents, tokenizer_of(bos_token="<s>", eos_token="</s>"))
    assert corpus.tokens.tolist() == [1, 3, 4, 5, 3, 4, 3, 2, 1, 2, 1, 4, 0, 2]
    assert corpus.offsets.tolist() == [0, 8, 10, 14]
    assert corpus.names == ("one", "empty", "two")
    assert corpus.begin_token == 1
    assert corpus.text_bytes is not None
    assert corpus.text_bytes.tolist() == [14, 0, 9]
    assert corpus.text_characters is not None
    assert corpus.text_characters.tolist() == [13, 0, 9]
    assert corpus.text_words is not None
    assert corpus.text_words.tolist() == [6, 0, 2]
    assert corpus.describe()["text_bytes"] == 23


@pytest.mark.parametrize(
    ("special", "begin", "end", "first", "last"),
    [
        ({"eos_token": "</s>"}, True, True, [2], [2]),  # GPT-2: eos begins a text
        ({"bos_token": "<s>"}, True, True, [1], []),
        ({}, True, True, [], []),
        ({"bos_token": "<s>", "eos_token": "</s>"}, False, False, [], []),
    ],
)
def test_missing_special_tokens_are_left_out(special, begin, end, first, last):
    corpus = tokenize([Document("x", "a b")], tokenizer_of(**special), begin=begin, end=end)
    assert corpus.tokens.tolist() == [*first, 3, 4, *last]
    assert corpus.begin_token == (first[0] if first else None)


def test_batching_does_not_change_the_corpus_and_long_texts_do_not_warn(
    documents, monkeypatch, caplog, recwarn
):
    whole = tokenize(documents, tokenizer_of(eos_token="</s>"))
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 1)
    single = tokenize(iter(documents), tokenizer_of(eos_token="</s>"), progress=False)
    assert single.hash == whole.hash
    assert single.names == whole.names
    assert not caplog.records
    assert not [warning for warning in recwarn if "longer than" in str(warning.message)]


def test_hash_follows_tokens_and_offsets():
    corpus = TokenCorpus.from_tokens([1, 2, 3, 4], [0, 2, 4])
    assert corpus.hash == TokenCorpus.from_tokens(np.array([1, 2, 3, 4]), [0, 2, 4]).hash
    assert corpus.hash != TokenCorpus.from_tokens([1, 2, 3, 4], [0, 1, 4]).hash
    assert corpus.hash != TokenCorpus.from_tokens([1, 2, 4, 3], [0, 2, 4]).hash
    # Stores and saved windows on disk refer to it: it must not change between versions.
    assert corpus.hash == "xxh3_128:57dcc2069f2a308bbd4dc9d7a7753145"


def test_document_of_passes_over_empty_documents():
    corpus = TokenCorpus.from_tokens(range(5), [0, 2, 2, 2, 5])
    assert corpus.document_of([0, 1, 2, 4]).tolist() == [0, 0, 3, 3]
    assert corpus.document_of([[1], [2]]).shape == (2, 1)
    assert len(corpus) == 5
    assert corpus.documents == 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TokenCorpus.from_tokens([1.5]), "must be integers, got float64"),
        (lambda: TokenCorpus.from_tokens([2**31]), r"below 2\*\*31, got 2147483648"),
        (lambda: TokenCorpus.from_tokens([1, -2]), "must not be negative, got -2"),
        (lambda: TokenCorpus.from_tokens([[1], [2]]), "one row of int32"),
        (lambda: TokenCorpus.from_tokens([1, 2], [0]), "an entry per document and one more"),
        (lambda: TokenCorpus.from_tokens([1, 2], [0, 1]), r"rise from 0 .*\(2\), got 0 to 1"),
        (lambda: TokenCorpus.from_tokens([1, 2], [0, 2, 1, 2]), "offsets must rise"),
        (
            lambda: TokenCorpus.from_tokens([1, 2], names=["a", "b"]),
            r"names must have one entry per document \(1\), got 2",
        ),
        (lambda: tokenize([], tokenizer_of()), "at least one document"),
        (
            lambda: tokenize([Document("x", "a"), Document("y", "")], tokenizer_of()),
            "at least two tokens.* longest of 2 documents has 1",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
