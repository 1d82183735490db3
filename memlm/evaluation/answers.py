"""Answers: greedy generation for prompts of any lengths, and how near an answer is to the true one.

F1 of tokens, as for SQuAD (Rajpurkar et al. 2016), in lower case and without punctuation and
articles, against the best of several references:

    precision = shared / tokens of the answer     recall = shared / tokens of the reference
    F1 = 2 precision recall / (precision + recall)

`constant_answer` is what a system scores that has read nothing. An empty answer scores 0, also
against an empty reference.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.progress import bar
from memlm.evaluation.reader import enough_positions
from memlm.models.running import frozen

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_tokens: int = 32_768,
    progress: bool = False,
) -> list[str]:
    """Continue every prompt greedily.

    Args:
        model: causal; extended, with a memory, or as it is.
        tokenizer: of the model.
        prompts: token ids. Prompts of different lengths are padded on the left.
        new_tokens: to write at most.
        batch_tokens: most tokens of prompts that are read side by side.
        progress: show a bar.

    Returns:
        The new text of each prompt, without special tokens.

    Raises:
        InputError: if a prompt is empty or a number is below 1.
        UnsupportedModelError: if the model has a table of positions that ends before a prompt.
    """
    lengths = [len(prompt) for prompt in prompts]
    check(min(lengths, default=1) >= 1, "every prompt must have at least one token, got none")
    check(
        min(new_tokens, batch_tokens) >= 1,
        f"numbers of tokens must be at least 1, got {new_tokens} new ones and {batch_tokens} in a "
        "batch",
    )
    answers = [""] * len(prompts)
    with bar(sum(lengths), label="answer", unit="token", quiet=not progress) as shown:
        for batch in _batches(lengths, batch_tokens):
            texts = _continue(model, tokenizer, [prompts[row] for row in batch], new_tokens)
            for row, text in zip(batch, texts, strict=True):
                answers[row] = text
                shown.update(lengths[row])
    return answers


def _batches(lengths: Sequence[int], limit: int) -> Iterable[list[int]]:
    """Rows in batches, by length so that little is padded."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if batch and lengths[row] * (len(batch) + 1) > limit:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
) -> list[str]:
    known: list[Any] = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    pad = next(token for token in known if token is not None)
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    with frozen(model), enough_positions(model, longest + new_tokens):
        whole: Any = model.generate(  # type: ignore[operator]
            tokens.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
    return tokenizer.batch_decode(whole[:, longest:], skip_special_tokens=True)


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and repeated space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_f1(prediction: str, references: Sequence[str]) -> float:
    """F1 of tokens against the best of the references, from 0 to 1."""
    check(len(references) > 0, "an answer needs at least one reference, got none")
    return max(_f1(prediction, reference) for reference in references)


def mean_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """``100 * mean`` of ``answer_f1``.

    Raises:
        InputError: if there is no answer, or not one list of references for each.
    """
    check(
        len(predictions) == len(references) > 0,
        f"there must be as many answers as lists of references, and at least one, got "
        f"{len(predictions)} and {len(references)}",
    )
    scores = [answer_f1(*pair) for pair in zip(predictions, references, strict=True)]
    return 100 * sum(scores) / len(scores)


def constant_answer(
    references: Sequence[Sequence[str]], answers: Iterable[str] = ("unanswerable", "yes", "no")
) -> tuple[str, float]:
    """The best of some answers that ignore text and question, and what it scores.

    Args:
        references: of every question.
        answers: to try; the first of several best wins.

    Returns:
        The answer and its ``mean_f1``.
    """
    scored = [(answer, mean_f1([answer] * len(references), references)) for answer in answers]
    check(len(scored) > 0, "a baseline needs at least one answer to try, got none")
    return max(scored, key=lambda pair: pair[1])


def _f1(prediction: str, reference: str) -> float:
    made, true = normalise_answer(prediction).split(), normalise_answer(reference).split()
    shared = sum((Counter(made) & Counter(true)).values())
    if shared == 0:
        return 0.0
    precision, recall = shared / len(made), shared / len(true)
    return 2 * precision * recall / (precision + recall)
