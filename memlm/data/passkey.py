"""Passkey retrieval: a number is told once in a long filler text, and asked for at its end.

    instruction   filler ... filler   The pass key is 71432. ...   filler ... filler   question

`original_passkeys` is the data of LM-Infinite's script (Han et al. 2024, section 4.4; the task is
from Mohtashami and Jaggi 2023), to the last digit: filler comes in whole paragraphs, the place of
the key is drawn, and a text is longer than its nominal length, because the script takes the
instruction for two tokens.

`exact_passkeys` is for curves: a prompt, question included, has exactly the tokens asked for, and
the key stands at a depth that is chosen, between two sentences. The first sentence of the filler
may be cut; everything after it is whole. The question ends without a space, which belongs to the
answer in most tokenizers, and all keys have five digits.
"""

from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.core.config import check

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
QUESTION = "What is the pass key? The pass key is"
ORIGINAL_SUFFIX = f" {QUESTION} "
"""What the original's evaluation appends to a text."""

_FILLER = " ".join(SENTENCES)
# The original takes the number of fields of the tokenizer's answer for the number of tokens.
_INSTRUCTION_TOKENS = 2


class Passkey(NamedTuple):
    """One text of the original's data.

    Attributes:
        text: without the question, see ``ORIGINAL_SUFFIX``.
        key: the number, as it is written in the text.
        before: paragraphs of filler before the key.
        paragraphs: of filler in all.
    """

    text: str
    key: str
    before: int
    paragraphs: int


class PasskeyPrompt(NamedTuple):
    """One prompt of an exact length.

    Attributes:
        tokens: from the begin token to the end of the question.
        key: the number that should follow.
        at: tokens before the sentence of the key.
    """

    tokens: list[int]
    key: str
    at: int


def original_passkeys(
    tokenizer: PreTrainedTokenizerBase, length: int, samples: int, *, first_half: bool = False
) -> list[Passkey]:
    """The texts that the paper's script writes; its random numbers depend on ``length`` alone.

    Args:
        tokenizer: by which the script counts; each part is counted with its special tokens.
        length: nominal, in tokens.
        samples: how many.
        first_half: keys stand in the first half only.

    Raises:
        InputError: if there is no room for two paragraphs of filler.
    """
    key_tokens = len(tokenizer.encode(_key_sentence("1")))
    filler_tokens = len(tokenizer.encode(_FILLER))
    paragraphs = (length - key_tokens - _INSTRUCTION_TOKENS) // filler_tokens
    smallest = 2 * filler_tokens + key_tokens + _INSTRUCTION_TOKENS
    check(
        paragraphs >= 2,
        f"the texts must have room for two paragraphs of filler, {smallest} tokens by this "
        f"tokenizer, got {length}; choose a longer length",
    )
    draw = np.random.RandomState(length)
    places = paragraphs // 2 if first_half else paragraphs
    made = []
    for _ in range(samples):
        key = str(draw.randint(1, 10_000_000))
        before = int(draw.randint(0, places))
        filler = [_FILLER] * paragraphs
        parts = [INSTRUCTION, *filler[:before], _key_sentence(key), *filler[before:]]
        made.append(Passkey(" ".join(parts), key, before, paragraphs))
    return made


def exact_passkeys(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, samples: int, *, seed: int = 0
) -> list[PasskeyPrompt]:
    """Prompts of exactly ``length`` tokens with the key at one depth.

    Args:
        tokenizer: a token may not reach from one sentence into the next.
        length: tokens of the whole prompt, begin token and question included.
        depth: share of the filler before the key, from 0 to 1; the nearest end of a sentence
            counts.
        samples: how many; they differ in their keys.
        seed: of the keys. The same seed gives the same keys at every length and depth.

    Raises:
        InputError: if a number is out of range or the length leaves no room for filler.
    """
    check(0 <= depth <= 1, f"the depth of the key must be from 0 to 1, got {depth}")
    check(samples >= 1, f"there must be at least 1 prompt, got {samples}")
    first: Any = tokenizer.bos_token_id
    begin: list[int] = [] if first is None else [first]
    start = [*begin, *tokenizer.encode(INSTRUCTION, add_special_tokens=False)]
    question = _continuing(tokenizer, QUESTION)
    sentences = [_continuing(tokenizer, sentence) for sentence in SENTENCES]
    prompts = []
    for key in np.random.default_rng(seed).integers(10_000, 100_000, samples).tolist():
        told = _continuing(tokenizer, _key_sentence(str(key)))
        room = length - len(start) - len(told) - len(question)
        check(
            room >= 1,
            f"prompts must have room for the instruction, key and question, {length - room} tokens "
            f"by this tokenizer, and at least one of filler, got {length}; choose a longer length",
        )
        filler, ends = _filler(sentences, room)
        before = int(ends[np.abs(ends - depth * room).argmin()])
        tokens = [*start, *filler[:before], *told, *filler[before:], *question]
        prompts.append(PasskeyPrompt(tokens, str(key), len(start) + before))
    return prompts


def _key_sentence(key: str) -> str:
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def _continuing(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text as they are behind another sentence."""
    stop = tokenizer.encode(".", add_special_tokens=False)
    return tokenizer.encode(f". {text}", add_special_tokens=False)[len(stop) :]


def _filler(sentences: list[list[int]], room: int) -> tuple[list[int], np.ndarray]:
    """So many tokens of filler that end with a whole paragraph, and where a key may stand in it."""
    paragraph = [token for sentence in sentences for token in sentence]
    repeats = -(-room // len(paragraph))
    ends = np.cumsum([len(sentence) for sentence in sentences] * repeats)
    ends -= len(paragraph) * repeats - room
    return (paragraph * repeats)[-room:], np.concatenate([[0], ends[ends > 0]])
