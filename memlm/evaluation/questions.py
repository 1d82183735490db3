"""Question answering over long texts: F1 of greedy answers, beside that of a constant one.

Prompts that are too long lose their centre, so that the instruction at the beginning and the
question at the end stay. Source: LM-Infinite (Han et al. 2024), section 4.4: at most 6144 tokens,
30 new ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.data.qasper import Question, answer_in
from memlm.evaluation.answers import constant_answer, mean_f1, write_answers
from memlm.evaluation.positions import Side, truncate


@dataclass(frozen=True)
class QuestionResult:
    """What a model answered.

    Attributes:
        f1: mean over questions of the best F1 of a reference, from 0 to 100.
        constant: the best answer that ignores everything.
        constant_f1: what it scores.
        answers: in the order of the questions.
        truncated: prompts that were too long.
        length: most tokens of a prompt; None: all were read whole.
    """

    f1: float
    constant: str
    constant_f1: float
    answers: tuple[str, ...]
    truncated: int
    length: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"protocol": self.describe(), **vars(self), "answers": list(self.answers)}

    def describe(self) -> str:
        """One line of protocol."""
        cut = "" if self.length is None else f" cut to {self.length} tokens ({self.truncated} were)"
        return (
            f"F1 {self.f1:.2f} of {len(self.answers)} greedy answers, prompts{cut or ' whole'}; "
            f"always answering {self.constant!r}: {self.constant_f1:.2f}"
        )


def measure_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    length: int | None = None,
    side: Side = "center",
    new_tokens: int = 30,
    batch_tokens: int = 32_768,
    progress: bool = True,
) -> QuestionResult:
    """Ask one model everything.

    Args:
        model: causal; extended, with a memory, or as it is.
        tokenizer: of the model; it puts its own special tokens around a prompt.
        questions: from ``read_qasper`` or ``read_narrative_qa``.
        length: most tokens of a prompt.
        side: what longer prompts lose.
        new_tokens: of an answer.
        batch_tokens: most tokens that are read side by side.
        progress: show a bar.

    Raises:
        InputError: without questions.
    """
    check(len(questions) > 0, "there must be at least one question, got none")
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    written = write_answers(
        model,
        tokenizer,
        [truncate(prompt, length, side) for prompt in prompts],
        new_tokens=new_tokens,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    answers = tuple(answer_in(text) for text in written)
    references = [question.references for question in questions]
    return QuestionResult(
        mean_f1(answers, references),
        *constant_answer(references),
        answers=answers,
        truncated=sum(length is not None and len(prompt) > length for prompt in prompts),
        length=length,
    )
