"""``memlm sweep``: settings of a memory tried on held-out text, from one pass of the model."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from memlm.cli.options import MemoryOptions, ModelOptions, TextOptions, show, write_result
from memlm.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Sweep(MemoryOptions, TextOptions, ModelOptions):
    """Try temperatures, sizes, neighbours, weights and merges of a memory of MODEL on TEXT, with
    one pass of the model, and show the best. Choose on development text, report on other text.
    """

    merges: Annotated[
        tuple[Literal["mixture", "union", "gate"], ...], arg(metavar="MERGE [MERGE ...]")
    ] = ()
    """How the memory may join the model: mixture (for each of --lams), union (one softmax), gate \
(a weight that follows what both claim; learnt). Default: mixture for knn and cache, union for \
trime."""
    lams: Annotated[tuple[float, ...], arg(metavar="LAM [LAM ...]")] = ()
    """Weights of the mixture to try (default: from 0.05 to 0.9)."""
    temperatures: Annotated[tuple[float, ...], arg(metavar="T [T ...]")] = ()
    """Temperatures to try; trime, cache: beside the square root of the model's width (default: \
around --temperature, or around the spread of the neighbours' scores)."""
    ks: Annotated[tuple[int, ...], arg(metavar="K [K ...]")] = ()
    """Numbers of neighbours to try, at most --k (default: --k and quarters of it)."""
    sizes: Annotated[tuple[int, ...], arg(metavar="N [N ...]")] = ()
    """trime, cache: sizes of the long-term memory to try (default: --long, quarters of it, 0)."""
    interpolations: Annotated[
        tuple[tuple[float, float], ...], arg(metavar="LAM TEMPERATURE ...")
    ] = ()
    """trime with --store: pairs at which the datastore is mixed in once more; the temperature \
divides the plain dot product."""
    cache: str | None = None
    """Directory for statistics of the pass: an interrupted sweep goes on, and one with other \
weights, neighbours, merges or interpolations needs no pass."""
    top: int = 10
    """Settings to show."""
    batch_tokens: int = 8192
    """Tokens read in one forward pass, padding included."""
    save: str | None = None
    """Keep everything as JSON in this file."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """One pass, then the grid."""
        from memlm.evaluation.report import tuning_report
        from memlm.evaluation.tune import LAMS, tune

        if self.method == "retomaton":
            raise InputError(
                "an automaton walks from token to token, so it cannot be swept; sweep --method "
                "knn, whose settings it shares"
            )
        model, tokenizer = self.load()
        memory, _ = self.memory(model)
        if memory is None:
            raise InputError("there must be a memory to sweep; give --store, or --method trime")
        scale = 1.0 if self.method == "knn" else model.config.get_text_config().hidden_size ** 0.5
        merges = self.merges or (("mixture",) if self.method == "cache" else None)
        found = tune(
            model,
            self.corpus(tokenizer),
            self.windows(model),
            memory,
            merges=merges,
            lams=self.lams or LAMS,
            temperatures=[scale * value for value in self.temperatures] or None,
            ks=self.ks or None,
            sizes=self.sizes or None,
            interpolations=self.interpolations,
            folder=self.cache,
            batch_tokens=self.batch_tokens,
            threads=self.threads,
        )
        write_result(self.save, found.to_dict())
        show(found.to_dict(), tuning_report(found, best=self.top), as_json=self.json)
        return 0
