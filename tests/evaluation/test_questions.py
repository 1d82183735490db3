"""Questions: the right prompts are cut at the centre, and answers are scored beside a constant."""

import pytest
import torch

from memlm.core.errors import InputError
from memlm.data.qasper import Question
from memlm.evaluation.questions import measure_questions
from memlm.testing.tiny import tiny_model

QUESTIONS = [
    Question("the cat sat on the mat", ("the dog",), "?", "1"),
    Question("a story was told once more the cat sat", ("yes", "mat"), "?", "1"),
    Question("and dog log a", ("yes",), "?", "2"),
]


class Echo:
    """Answers every prompt with its first and its last words; a model as far as it is used."""

    device = torch.device("cpu")

    def __init__(self):
        self.model = tiny_model("llama")

    def __getattr__(self, name):
        return getattr(self.__dict__["model"], name)

    def generate(self, tokens, *, attention_mask, max_new_tokens, **settings):
        rows = []
        for row, mask in zip(tokens, attention_mask, strict=True):
            real = row[mask.bool()]
            rows.append(torch.cat([row, real[:1], real[-2:]]))
        return torch.stack(rows)


def test_answers_are_scored_beside_a_constant(tokenizer):
    found = measure_questions(Echo(), tokenizer, QUESTIONS, length=5)
    assert found.answers == ("the the mat", "a cat sat", "and log a")
    assert (found.constant, found.constant_f1) == ("yes", pytest.approx(200 / 3))
    assert found.f1 == 0
    assert found.truncated == 2
    assert "cut to 5 tokens (2 were)" in found.describe()
    assert found.to_dict()["answers"] == list(found.answers)
    whole = measure_questions(Echo(), tokenizer, QUESTIONS, side="left")
    assert whole.truncated == 0
    assert "prompts whole" in whole.describe()


def test_a_model_answers(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    found = measure_questions(model, tokenizer, QUESTIONS, length=4, new_tokens=3)
    assert len(found.answers) == 3
    assert 0 <= found.f1 <= 100


def test_no_questions_are_refused(tokenizer):
    with pytest.raises(InputError, match="at least one question"):
        measure_questions(tiny_model("llama"), tokenizer, [])
