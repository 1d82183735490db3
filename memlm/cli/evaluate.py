"""``memlm evaluate``: perplexity of a model, with and without its memory, on held-out text."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from memlm.cli.lengths import LengthOptions
from memlm.cli.options import (
    METHODS,
    READ_TEXT,
    MemoryOptions,
    ModelOptions,
    TextOptions,
    show,
    write_result,
)
from memlm.cli.questions import QuestionOptions
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from memlm.core.merges import Mixture
    from memlm.data.windows import Windows
    from memlm.memory.knn import KnnMemory


@dataclass(frozen=True, kw_only=True)
class Evaluate(QuestionOptions, LengthOptions, MemoryOptions, TextOptions, ModelOptions):
    """Perplexity of MODEL on TEXT, alone and (with --store or --method trime) with its memory,
    protocol included. --tune chooses lam, the temperature and k on other held-out text first (for
    retomaton: those of the same store searched at every token). With several lengths (--length 512
    2048 8192): perplexity of the same tokens after ever longer texts, by several ways to read them.
    With --task: questions about long texts, by F1.
    """

    length: Annotated[tuple[int, ...], arg(metavar="N [N ...]")] = ()  # type: ignore[assignment]
    """Tokens the model reads at once (default: 512, or the model's positions if fewer; \
knn-transformers: 1024); several: compare them."""
    tune: str | None = None
    """knn, retomaton: text on which lam and the temperature are chosen before TEXT is scored."""
    interpolate: Annotated[tuple[float, float] | None, arg(metavar="LAM TEMPERATURE")] = None
    """trime: mix the datastore into the result once more, with this weight and a temperature of \
its own, which divides the dot products."""
    carry: Literal["document", "window"] | None = None
    """What was read goes on to the end of a document (default for retomaton), or begins empty in \
each window, but for the long-term memory (default for trime and cache)."""
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

        self._check_method()
        model, tokenizer = self.load()
        if self.task != "perplexity":
            return self.ask(
                model,
                tokenizer,
                self.text,
                self.length,
                window=self.window,
                sinks=self.sinks,
                limit=self.limit,
                batch_tokens=self.batch_tokens,
                threads=self.threads,
                save=self.save,
                as_json=self.json,
            )
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
        memory: Any  # of one of the methods
        memory, merge = self.memory(model)
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
                interpolate=self._interpolated(memory),
                carry=self.carry or ("window" if self.method in READ_TEXT else "document"),
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

    def _check_method(self) -> None:
        if self.task != "perplexity" and (self.store is not None or self.method in READ_TEXT):
            raise InputError(
                f"--task {self.task} asks the model alone, so it takes neither --store nor "
                f"--method {self.method}; leave them out"
            )
        if self.tune is not None and self.method in READ_TEXT:
            raise InputError(
                "--tune chooses for a store that is searched, so the method must be knn or "
                f"retomaton, got {self.method}; compare a few values of --temperature instead"
            )
        if self.interpolate is not None and (self.method != "trime" or self.store is None):
            raise InputError(
                "--interpolate mixes TRIME's datastore in once more, so it needs --method trime "
                f"and --store, got {self.method} and {self.store or 'no store'}"
            )

    def _interpolated(self, memory: Any) -> "tuple[KnnMemory, Mixture] | None":
        from memlm.core.merges import Mixture

        if self.interpolate is None:
            return None
        lam, temperature = self.interpolate
        external = memory.members[-1]  # with its index, which is not opened again
        return external.changed(external.k, temperature), Mixture(lam)

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
