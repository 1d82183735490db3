"""``memlm evaluate``: perplexity of a model, with and without its memory, on held-out text."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from memlm.cli.lengths import LengthOptions
from memlm.cli.options import (
    METHODS,
    MemoryOptions,
    ModelOptions,
    TextOptions,
    show,
    write_result,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlm.data.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Evaluate(LengthOptions, MemoryOptions, TextOptions, ModelOptions):
    """Perplexity of MODEL on TEXT, alone and (with --store) with its memory, protocol included.
    --tune chooses lam, the temperature and k on other held-out text first (for retomaton: those of
    the same store searched at every token). With several lengths (--length 512 2048 8192):
    perplexity of the same tokens after ever longer texts, by several ways to read them.
    """

    length: Annotated[tuple[int, ...], arg(metavar="N [N ...]")] = ()  # type: ignore[assignment]
    """Tokens the model reads at once (default: 512, or the model's positions if fewer; \
knn-transformers: 1024); several: compare them."""
    tune: str | None = None
    """Text on which lam and the temperature are chosen before TEXT is scored."""
    carry: Literal["document", "window"] = "document"
    """retomaton: its state goes on to the end of a document, or begins empty in each window."""
    leave_out: Literal["nothing", "position", "document"] = "nothing"
    """knn, where the store is made of TEXT: tokens do not find their own entry, or none of their \
own document."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    save: str | None = None
    """Write every evaluation, with all that is needed to repeat it, to this JSON file."""
    json: bool = False
    """Print the results as JSON."""

    def run(self) -> int:
        """Evaluate the model, then the model with its memory."""
        from memlm.evaluation.perplexity import evaluate
        from memlm.evaluation.report import report, tuning_report
        from memlm.evaluation.tune import tune

        model, tokenizer = self.load()
        corpus = self.corpus(tokenizer)
        if len(self.length) > 1:
            return self.measure(
                model,
                corpus,
                self.length,
                threads=self.threads,
                save=self.save,
                as_json=self.json,
            )
        windows = self.windows(model)
        settings = {"batch_tokens": self.batch_tokens, "threads": self.threads}
        memory, merge = self.memory()
        chosen = None
        if memory is not None and self.tune is not None:
            held_out = replace(self, text=self.tune).corpus(tokenizer)
            searched = memory if self.method == "knn" else self.searched(memory.index)
            chosen = tune(model, held_out, windows, searched, **settings)
            memory, merge = memory.changed(chosen.best.k, chosen.best.temperature), chosen.merge
            if not self.json:
                show({}, tuning_report(chosen, best=3), as_json=False)
        results = {"base": evaluate(model, corpus, windows, **settings)}
        if memory is not None:
            results[METHODS[self.method]] = evaluate(
                model,
                corpus,
                windows,
                memory=memory,
                merge=merge,
                carry=self.carry,
                leave_out=self.leave_out,
                **settings,
            )
        value = {name: result.to_dict() for name, result in results.items()}
        if chosen is not None:
            value["tuned"] = chosen.to_dict()
        write_result(self.save, value)
        summaries = {name: result.summary() for name, result in results.items()}
        show(summaries, report(results), as_json=self.json)
        return 0

    def windows(self, model: "PreTrainedModel") -> "Windows":
        """The windows of the protocol, of the one length that was given."""
        text = TextOptions(
            text=self.text,
            protocol=self.protocol,
            length=self.length[0] if self.length else None,
            stride=self.stride,
            context=self.context,
        )
        return text.windows(model)
