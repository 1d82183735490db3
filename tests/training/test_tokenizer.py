"""Training a tokenizer: every text comes back, and end of text is never made from text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from memlm.core.errors import InputError
from memlm.data.documents import Document
from memlm.training.tokenizer import END_OF_TEXT, train_tokenizer

DOCUMENTS = [
    Document(str(n), f"def read(self, size={n}):\n    return the next {n} bytes of it\n")
    for n in range(80)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 320)


@settings(deadline=None, max_examples=50)
@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_end_of_text_is_token_zero_and_only_put_by_id(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == 320
    assert 0 not in tokenizer(END_OF_TEXT)["input_ids"]


def test_saving_and_loading_keep_it(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "def read(self):\n\n\treturn  é<|endoftext|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == 0
    assert len(loaded) == 320


def test_learns_words_and_is_deterministic(tokenizer):
    again = train_tokenizer(DOCUMENTS, 320)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer(" return the next bytes")["input_ids"]) == 4


@pytest.mark.parametrize(
    ("documents", "size", "message"),
    [
        (DOCUMENTS, 256, "at least 257"),
        ([], 300, "got none"),
        ([Document("empty", "")], 300, "got none"),
        (DOCUMENTS[:2], 5000, "5000 were asked for"),
    ],
)
def test_what_cannot_give_a_vocabulary_is_refused(documents, size, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(documents, size)


def test_a_smaller_vocabulary_can_be_accepted():
    assert 257 < len(train_tokenizer(DOCUMENTS[:2], 5000, exact=False)) < 5000
