"""``memlm evaluate``: perplexity of a model, with and without its memory, on held-out text."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from memlm.cli.lengths import LengthOptions
from memlm.cli.options import (
    METHODS,
    READ_TEXT,
    InterpolationOptions,
    ModelOptions,
    TextOptions,
    show,
    write_result,
)
from memlm.cli.questions import QuestionOptions
from memlm.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.data.tokens import TokenCorpus
    from memlm.data.windows import Windows


@dataclass(frozen=True, kw_only=True)
class Evaluate(QuestionOptions, LengthOptions, InterpolationOptions, TextOptions, ModelOptions):
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
    """Text on which the memory's settings (weight, temperature, neighbours, size) are chosen \
before TEXT is scored; memlm sweep tries more."""
    method: Literal["knn", "retomaton", "trime", "cache"] | None = None  # type: ignore[assignment]
    """knn: search the --store at every token (kNN-LM), the default if there is one; retomaton: \
follow its pointers and search when they run out; trime: what was read before in this window \
(local memory), with --long also in those before, with --store also a datastore of metric ip, all \
under the model's softmax; cache: the text read before, mixed in (continuous cache)."""
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
        """Evaluate the model, then the model with its memory; several processes share the work."""
        from memlm.core.processes import joined_processes

        self._check()
        with joined_processes():
            return replace(self, method=self.method or "knn")._run()

    def _run(self) -> int:
        from memlm.evaluation.perplexity import evaluate
        from memlm.evaluation.report import report, tuning_report
        from memlm.evaluation.tune import tune
        from memlm.models.retro.generation import RetrievingGeneration

        model, tokenizer = self.load()
        if self.task != "perplexity":
            return self.ask(
                model,
                tokenizer,
                self.text,
                self.length,
                window=self.window,
                sinks=self.sinks,
                middle=self.middle_tokens(),
                limit=self.limit,
                batch_tokens=self.batch_tokens,
                threads=self.threads,
                save=self.save,
                as_json=self.json,
            )
        if isinstance(model, RetrievingGeneration) and not self.json:
            note = "reads neighbours and has none here; `memlm retro evaluate` gives it some"
            show({}, f"note: {self.model} {note}", as_json=False)
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
            held_out = self._read(self.tune, self.limit, tokenizer)
            walks = self.method == "retomaton"
            tried = self.searched(memory.index) if walks else memory
            merges = ("mixture",) if self.method == "cache" else None
            chosen = tune(model, held_out, windows, tried, merges=merges, **settings)
            best = chosen.best
            memory = memory.changed(best.k, best.temperature) if walks else chosen.apply(memory)
            merge = chosen.merge
            if not self.json:
                show({}, tuning_report(chosen, best=3), as_json=False)
        results = {"base": evaluate(model, corpus, windows, **settings)}
        if memory is not None:
            results[METHODS[self.method or "knn"]] = evaluate(
                model,
                corpus,
                windows,
                memory=memory,
                merge=merge,
                interpolate=self.interpolated(memory),
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

    def _check(self) -> None:
        self._check_lengths()
        self.check_interpolation()
        needs = self.method in ("knn", "retomaton") or (self.method is None and self.tune)
        if self.store is None and needs:
            raise InputError(
                f"{f'--method {self.method}' if self.method else '--tune'} needs a datastore, got "
                "none; give --store, or leave it out to evaluate the model alone"
            )
        if self.also and self.tune:
            raise InputError(
                "--tune chooses for one datastore, got --also beside it; tune each by itself, then "
                "give the weights"
            )
        if self.task != "perplexity" and (self.store is not None or self.method in READ_TEXT):
            raise InputError(
                f"--task {self.task} asks the model alone, so it takes neither --store nor "
                f"--method {self.method}; leave them out"
            )

    def _check_lengths(self) -> None:
        options = {
            "--store": self.store,
            "--method": self.method,
            "--tune": self.tune,
            "--interpolate": self.interpolate,
            "--carry": self.carry,
            "--long": self.long or None,
            "--leave-out": None if self.leave_out == "nothing" else self.leave_out,
            "--protocol": None if self.protocol == "sliding" else self.protocol,
            "--stride": self.stride,
        }
        given = [name for name, value in options.items() if value is not None]
        if len(self.length) > 1 and self.task == "perplexity" and given:
            raise InputError(
                "several lengths compare ways to read with the model alone, got "
                f"{', '.join(given)} beside them; leave that out, or give one --length"
            )
        idle = {
            "--plot": self.plot,
            "--full-limit": self.full_limit,
            "--window": self.window,
            "--middle": self.middle or None,
        }
        given = [name for name, value in idle.items() if value is not None]
        if len(self.length) < 2 and self.task == "perplexity" and given:
            raise InputError(
                f"{', '.join(given)} says how several lengths are compared, got "
                f"{len(self.length)}; give --length two or more numbers"
            )
        if self.is_part() and (self.protocol != "sliding" or self.task != "perplexity"):
            raise InputError(
                "parts of a text are for the protocol sliding and the task perplexity, got "
                f"{self.protocol} and {self.task}; use --limit alone"
            )

    def corpus(self, tokenizer: "PreTrainedTokenizerBase") -> "TokenCorpus":
        """The part of the text that was asked for, tokenised."""
        if not self.is_part():
            return self._read(self.text, self.limit, tokenizer)
        limit = None if self.limit is None else self.start_document + self.limit
        return self.part(self._read(self.text, limit, tokenizer))

    def _read(
        self, text: str, limit: int | None, tokenizer: "PreTrainedTokenizerBase"
    ) -> "TokenCorpus":
        options = TextOptions(
            text=text,
            field=self.field,
            separator=self.separator,
            limit=limit,
            protocol=self.protocol,
        )
        return options.corpus(tokenizer)

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
