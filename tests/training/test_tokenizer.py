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


def test_words_are_what_stands_between_spaces_and_line_breaks_count():
    text = " = Lobsters = \n \n The <unk> eats the plant . \n"
    words = train_tokenizer([Document("a", text)], 100, level="word", exact=False)
    pieces = words.convert_ids_to_tokens(words(text)["input_ids"])
    assert " ".join(pieces) == text.strip(" ")
    assert words.convert_ids_to_tokens(words("The crab")["input_ids"]) == ["The", "<unk>"]
    frequent = train_tokenizer([Document("a", text)], 4, level="word")
    assert set(frequent.get_vocab()) == {"<|endoftext|>", "<unk>", "\n", "="}


def test_characters_come_back_as_they_were():
    text = "Año nuevo,\nvida nueva."
    characters = train_tokenizer([Document("a", text)], 100, level="character", exact=False)
    ids = characters(text)["input_ids"]
    assert len(ids) == len(text)
    assert characters.decode(ids) == text
    assert characters("ñz")["input_ids"] == [characters.get_vocab()["ñ"], characters.unk_token_id]


def test_257_tokens_are_bytes():
    tokenizer = train_tokenizer([Document("a", "Año")], 257)
    assert len(tokenizer("Año!")["input_ids"]) == len("Año!".encode())


def test_unknown_levels_are_refused():
    with pytest.raises(InputError, match="one of bpe, word, character"):
        train_tokenizer([Document("a", "b")], 300, level="syllable")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 3 tokens"):
        train_tokenizer([Document("a", "b")], 2, level="word")
