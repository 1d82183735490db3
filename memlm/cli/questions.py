"""The part of ``memlm evaluate`` that asks questions about long texts."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memlm.cli.options import show, write_result
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Which task it is."""

    task: Literal["perplexity", "qasper", "narrative-qa"] = "perplexity"
    """What is measured; for qasper and narrative-qa TEXT is a .json or .jsonl file of their \
questions, --length cuts the centre out of longer prompts, and --window extends the model."""
    style: Literal["plain", "chat"] = "plain"
    """qasper, narrative-qa: plain prompts, or with the marks of a Llama 2 chat."""
    answer_tokens: int = 30
    """qasper, narrative-qa: tokens of an answer at most."""

    def ask(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        text: str,
        lengths: tuple[int, ...],
        *,
        window: int | None,
        sinks: int,
        limit: int | None,
        batch_tokens: int,
        threads: int | None,
        save: str | None,
        as_json: bool,
    ) -> int:
        """Ask, print and keep."""
        from memlm.core.threads import torch_threads
        from memlm.data.qasper import read_narrative_qa, read_qasper
        from memlm.evaluation.questions import measure_questions
        from memlm.models.extend import extended

        if len(lengths) > 1:
            raise InputError(
                f"the prompts of {self.task} are cut to one --length, got {len(lengths)} of them"
            )
        read = read_qasper if self.task == "qasper" else read_narrative_qa
        questions = read(text, style=self.style)[:limit]
        whole = nullcontext() if window is None else extended(model, window=window, sinks=sinks)
        with torch_threads(threads), whole:
            result = measure_questions(
                model,
                tokenizer,
                questions,
                length=lengths[0] if lengths else None,
                new_tokens=self.answer_tokens,
                batch_tokens=batch_tokens,
            )
        reading = "as it is" if window is None else f"window {window}, {sinks} sinks"
        value = {"task": self.task, "reading": reading, **result.to_dict()}
        write_result(save, value)
        show(value, f"{self.task}: {result.describe()}; model read {reading}", as_json=as_json)
        return 0
