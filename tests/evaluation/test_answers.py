"""Answers: a batch gives what single prompts give; F1 counts shared words."""

import pytest

from memlm.core.errors import InputError
from memlm.evaluation.answers import (
    answer_f1,
    constant_answer,
    mean_f1,
    write_answers,
)
from memlm.models.extend import extended
from memlm.testing.tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("window", [None, 8])
def test_batches_do_not_matter(tokenizer, window):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    ids = (tiny_tokens(1, 60)[0] % len(tokenizer)).tolist()
    prompts = [ids[:30], ids[5:9], ids[2:50], ids[7:9]]

    def written(batch):
        return write_answers(model, tokenizer, prompts, new_tokens=9, batch_tokens=batch)

    if window is None:
        single, together = written(1), written(10_000)
    else:
        with extended(model, window=window, sinks=2):
            single, together = written(1), written(10_000)
    assert single == together
    assert len(set(single)) > 1


def test_bad_prompts_are_refused(tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    with pytest.raises(InputError, match="every prompt must have at least one token"):
        write_answers(model, tokenizer, [[1], []], new_tokens=3)
    with pytest.raises(InputError, match="at least 1, got 0 new ones"):
        write_answers(model, tokenizer, [[1]], new_tokens=0)
    assert write_answers(model, tokenizer, [], new_tokens=3) == []


def test_f1_of_known_answers():
    assert answer_f1("the seed lexicon", ["a Seed-lexicon", "seed"]) == pytest.approx(2 / 3)
    assert answer_f1("x y", ["z"]) == 0
    assert answer_f1("", [""]) == 0
    assert mean_f1(["yes", "no"], [["Yes."], ["yes"]]) == 50


def test_constant_answers():
    references = [["yes"], ["no"], ["Unanswerable", "x"], ["unanswerable"]]
    assert constant_answer(references) == ("unanswerable", 50.0)
    assert constant_answer(references, ["yes", "x"]) == ("yes", 25.0)
    with pytest.raises(InputError, match="at least one answer to try"):
        constant_answer(references, [])


def test_scores_need_references():
    with pytest.raises(InputError, match="at least one reference"):
        answer_f1("x", [])
    with pytest.raises(InputError, match="as many answers as lists of references"):
        mean_f1(["x"], [])
    with pytest.raises(InputError, match="as many answers as lists of references"):
        mean_f1([], [])
