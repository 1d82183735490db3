"""The part of ``memlm evaluate`` that asks questions about long texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from memlm.cli.options import show, write_result
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.ops.middle_rule import MiddleConfig


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Which task it is."""

    task: Literal["perplexity", "qasper", "narrative-qa"] = "perplexity"
    """What is measured; for qasper and narrative-qa TEXT is a .json, .jsonl or .parquet file \
of their questions, --length cuts the centre out of longer prompts, --window extends the model."""
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
        middle: "MiddleConfig | None",
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
        from memlm.evaluation.ways import reading

        if len(lengths) > 1:
            raise InputError(
                f"the prompts of {self.task} are cut to one --length, got {len(lengths)} of them"
            )
        read = read_qasper if self.task == "qasper" else read_narrative_qa
        questions = read(text, style=self.style)[:limit]
        way = "vanilla" if window is None else "lm-infinite"
        if middle is not None:
            if window is None:
                raise InputError("--middle needs a model that is extended; give --window")
            way = "lm-infinite-middle"
        ready = reading(model, way, window=window or 0, sinks=sinks, middle=middle)
        with torch_threads(threads), ready:
            result = measure_questions(
                model,
                tokenizer,
                questions,
                length=lengths[0] if lengths else None,
                new_tokens=self.answer_tokens,
                batch_tokens=batch_tokens,
            )
        told = "as it is" if window is None else f"window {window}, {sinks} sinks"
        told += f", {middle.describe()}" if middle is not None else ""
        value = {"task": self.task, "reading": told, **result.to_dict()}
        write_result(save, value)
        show(value, f"{self.task}: {result.describe()}; model read {told}", as_json=as_json)
        return 0
