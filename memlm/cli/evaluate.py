"""``memlm evaluate``: perplexity of a model, with and without its memory, on held-out text."""

from dataclasses import dataclass

from memlm.cli.options import MemoryOptions, ModelOptions, TextOptions, show, write_result


@dataclass(frozen=True, kw_only=True)
class Evaluate(MemoryOptions, TextOptions, ModelOptions):
    """Perplexity of MODEL on TEXT, alone and (with --store) with its memory, protocol included.
    --tune chooses lam and the temperature on other held-out text first.
    """

    tune: str | None = None
    """Text on which lam and the temperature are chosen before TEXT is scored."""
    batch_tokens: int = 8192
    """Tokens per forward pass."""
    save: str | None = None
    """Write every evaluation, with all that is needed to repeat it, to this JSON file."""
    json: bool = False
    """Print the results as JSON."""

    def run(self) -> int:
        """Evaluate the model, then the model with its memory."""
        from dataclasses import replace

        from memlm.evaluation.perplexity import evaluate
        from memlm.evaluation.report import report
        from memlm.evaluation.tune import tune

        model, tokenizer = self.load()
        corpus, windows = self.corpus(tokenizer), self.windows(model)
        memory, merge = self.memory()
        settings = {"batch_tokens": self.batch_tokens, "threads": self.threads}
        chosen = None
        if memory is not None and self.tune is not None:
            held_out = replace(self, text=self.tune).corpus(tokenizer)
            chosen = tune(model, held_out, windows, memory, **settings)
            memory, merge = memory.changed(chosen.best.k, chosen.best.temperature), chosen.merge
        results = {"base": evaluate(model, corpus, windows, **settings)}
        if memory is not None:
            results["kNN-LM"] = evaluate(
                model, corpus, windows, memory=memory, merge=merge, **settings
            )
        value = {name: result.to_dict() for name, result in results.items()}
        if chosen is not None:
            value["tuned"] = chosen.to_dict()
        write_result(self.save, value)
        summaries = {name: result.summary() for name, result in results.items()}
        show(summaries, report(results), as_json=self.json)
        return 0
