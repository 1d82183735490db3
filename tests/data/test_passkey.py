"""Passkey prompts: exact lengths, keys where they should be, and one cut sentence at most."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import memlm
from memlm.core.errors import InputError
from memlm.data.passkey import (
    INSTRUCTION,
    QUESTION,
    SENTENCES,
    exact_passkeys,
    original_passkeys,
)


@pytest.fixture(scope="module")
def spaced():
    """A byte-level tokenizer, which has no begin token and puts spaces before words."""
    text = [INSTRUCTION, QUESTION, *SENTENCES] * 3
    return memlm.train_tokenizer(memlm.read_documents(text), vocab_size=300)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(230, 900),
    depth=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_lengths_are_exact_and_the_text_is_whole(spaced, length, depth, seed):
    begin = [] if spaced.bos_token_id is None else [spaced.bos_token_id]
    (prompt,) = exact_passkeys(spaced, length, depth, 1, seed=seed)
    assert len(prompt.tokens) == length
    text = spaced.decode(prompt.tokens[len(begin) :])
    told = f" The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
    assert text.startswith(INSTRUCTION)
    assert text.endswith(f" {QUESTION}")
    assert text.count(told) == 1
    assert spaced.decode(prompt.tokens[prompt.at :]).startswith(told)
    filler = text[len(INSTRUCTION) : -len(QUESTION) - 1].replace(told, "")
    assert (" " + " ".join(SENTENCES * 50)).endswith(filler)
    # the key stands between sentences, but for a cut one right after the instruction
    before = text[len(INSTRUCTION) : text.index(told)]
    assert before == "" or before.endswith(".")


def test_depths_go_from_the_beginning_to_the_end(spaced):
    ats = [exact_passkeys(spaced, 900, depth / 4, 1)[0].at for depth in range(5)]
    start = len(exact_passkeys(spaced, 900, 0, 1)[0].tokens) - 900 + ats[0]
    assert ats == sorted(set(ats))
    room = ats[-1] - start
    assert [(at - start) / room for at in ats] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.05)


def test_keys_are_the_same_at_every_length(spaced):
    keys = [
        [prompt.key for prompt in exact_passkeys(spaced, length, depth, 6, seed=3)]
        for length, depth in ((300, 0.1), (500, 0.9))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) > 1
    assert all(len(key) == 5 for key in keys[0])
    assert keys[0] != [prompt.key for prompt in exact_passkeys(spaced, 300, 0.1, 6, seed=4)]


def test_what_does_not_fit_is_refused(spaced):
    with pytest.raises(InputError, match="room for the instruction, key and question"):
        exact_passkeys(spaced, 40, 0.5, 1)
    with pytest.raises(InputError, match="depth of the key must be from 0 to 1, got 2"):
        exact_passkeys(spaced, 400, 2, 1)
    with pytest.raises(InputError, match="at least 1 prompt, got 0"):
        exact_passkeys(spaced, 400, 0, 0)
    with pytest.raises(InputError, match="two paragraphs of filler"):
        original_passkeys(spaced, 50, 1)
