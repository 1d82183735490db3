"""Tuning a memory: one pass over the text, then the whole grid in seconds.

Weight, temperature, memory size and number of neighbours depend on the model (a temperature divides
squared distances or dot products, whose size grows with the width of the keys) and on how close the
memory is to the text. None of them changes the hidden states. So one pass keeps a few numbers for
every scored token (`memlm.evaluation.statistics`), and then

    p(y)  from  merge( model, union( past(y; size, T), neighbours(y; k, T) ) )

costs a few sums for each setting: no model, no search. The merges are

    mixture   (1 - lam) p_model + lam p_memory                     for every lam    (kNN-LM, eq. 3)
    union     one softmax over all                                                   (TRIME, eq. 4)
    gate      a weight that follows the mass the two claim; its two numbers are learnt by gradient

and on top of each the neighbours may be mixed in once more, flatter (TRIME, eq. 7).

The best setting is chosen *on this text* and is therefore optimistic here: tune on development
text, report on other text. A best value at the edge of the grid is named, because a better one may
lie beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.core.errors import InputError
from memlm.core.files import read_json, write_json
from memlm.core.merges import Merge, Mixture, Union
from memlm.core.threads import torch_threads
from memlm.core.types import TargetPartial, TokenMemory
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows
from memlm.evaluation.passes import Pass, Stopwatch, plan_pass
from memlm.evaluation.perplexity import (
    BATCH_TOKENS,
    choose_tap,
    document_sums,
    model_identity,
    protocol_of,
    versions,
)
from memlm.evaluation.protocol import EXACT, recall_words
from memlm.evaluation.result import DocumentSums
from memlm.evaluation.statistics import Members, gather
from memlm.evaluation.trials import Grid, Trial, search_grid
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.models.attach import MemoryForCausalLM
from memlm.models.match import check_match
from memlm.models.running import frozen

LAMS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPREADS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Default temperatures for a store: these times the median of (nearest - farthest score), and 1."""
FACTORS = (0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Default temperatures for what was read before: these times the memory's own."""

MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class Tuning(Config):
    """The result of `tune`; JSON in and out.

    Attributes:
        best: the setting with the lowest perplexity; among equals, the smaller k, lam, temperature.
        trials: all settings.
        base_perplexity: of the model alone.
        tokens: how many were scored.
        at_edge: which of lam, temperature, k and size are best at the edge of their grid, so that
            a better value may lie beyond it.
        cache_bytes: what the statistics took.
        pass_seconds: of the one pass over the text.
        grid_seconds: of all trials.
        protocol: how the numbers were made, as in an evaluation.
        model: name, hash, dtype, device and tap.
        corpus: counts and hash.
        versions: of the packages the numbers depend on.
    """

    best: Trial
    trials: tuple[Trial, ...]
    base_perplexity: float
    tokens: int
    at_edge: tuple[str, ...]
    cache_bytes: int
    pass_seconds: float
    grid_seconds: float
    protocol: dict[str, Any]
    model: dict[str, Any]
    corpus: dict[str, Any]
    versions: dict[str, str]

    @property
    def merge(self) -> Merge:
        """The best merge."""
        return self.best.merge

    def apply(self, memory: TokenMemory) -> TokenMemory:
        """The memory that was tuned, with the best settings."""
        return with_settings(memory, self.best)

    def interpolate(self, memory: TokenMemory) -> tuple[TokenMemory, Mixture] | None:
        """What the best setting mixes in once more, for ``evaluate`` and ``attach``."""
        return interpolated(memory, self.best)

    def describe(self) -> str:
        """The result in one line."""
        best = self.best
        edge = f"; at the edge of the grid: {', '.join(self.at_edge)}" if self.at_edge else ""
        return (
            f"best of {len(self.trials)} settings: {best.describe()}, perplexity "
            f"{best.perplexity:.4g} (model alone {self.base_perplexity:.4g}) over "
            f"{self.tokens:,} tokens, chosen on this text{edge}"
        )

    def save(self, path: str | Path) -> None:
        """Write everything as JSON, atomically."""
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The tuning that ``save`` wrote."""
        return cls.from_dict(read_json(Path(path)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The tuning that ``to_dict`` wrote.

        Raises:
            InputError: for another class, a newer format or missing parts.
        """
        if "best" not in values or "trials" not in values:
            raise InputError(
                "a tuning must have its best setting and all trials, got only "
                f"{', '.join(sorted(values))}; is this the JSON of a tuning?"
            )
        trials = tuple(Trial.from_dict(value) for value in values["trials"])
        best = Trial.from_dict(values["best"])
        return super().from_dict({**values, "trials": trials, "best": best})


def tune(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: Windows,
    memory: TokenMemory,
    *,
    merges: Sequence[str] | None = None,
    lams: Sequence[float] = LAMS,
    temperatures: Sequence[float] | None = None,
    ks: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    interpolations: Sequence[tuple[float, float]] = (),
    folder: str | Path | None = None,
    tap: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    threads: int | None = None,
    most_bytes: int = MOST_BYTES,
    progress: bool = True,
) -> Tuning:
    """Find the best settings of a memory on a text.

    Args:
        model: causal language model.
        corpus: development text, tokens of the model's tokenizer.
        windows: the rule that cuts it.
        memory: a memory without state that has a ``temperature``, a `LocalMemory`, a `LongMemory`,
            or a `Together` of one each; its own k is the largest that can be tried.
        merges: which to try, of "mixture", "union" and "gate"; None: "mixture" for a store alone,
            "union" for memories that read the text.
        lams: weights to try, between 0 and 1; for "mixture".
        temperatures: divisors to try, each for all members alike; None: for a store `SPREADS` times
            the median spread of scores, and 1; for others `FACTORS` times their own.
        ks: numbers of neighbours to try; None: all that were found, and quarters of it down to 4.
        sizes: of the long-term memory; None: its own and quarters of it down to 256, and 0 if there
            is a local memory.
        interpolations: (lam, temperature) at which the neighbours are mixed in once more, beside
            not to.
        folder: where statistics are kept, so that an interrupted pass goes on and another grid of
            weights, neighbours or interpolations needs none.
        tap: as in `evaluate`.
        batch_tokens: as in `evaluate`.
        threads: as in `evaluate`.
        most_bytes: refuse to keep more than this.
        progress: show a bar for work over two seconds.

    Raises:
        InputError: for a memory that walks from token to token or has no temperature, a grid out of
            range, or more statistics than ``most_bytes`` can hold; and as `evaluate`.
    """
    check(
        not isinstance(model, MemoryForCausalLM),
        "tuning needs the model alone and the memory beside it, got a model with a memory "
        "attached; pass model.detach() and model.memory",
    )
    members = Members.of(memory)
    grid = Grid(
        merges=tuple(merges or (("union",) if members.reads else ("mixture",))),
        lams=tuple(lams),
        temperatures=tuple(temperatures or _own_temperatures(members)),
        ks=tuple(ks or ()),
        sizes=tuple(_sizes(members) if sizes is None else sizes),
        interpolations=tuple((float(lam), float(value)) for lam, value in interpolations),
    )
    _check_grid(grid, members)
    watch = Stopwatch(model.device)
    with frozen(model), torch_threads(threads):
        with watch.measure("pass"):
            plan = plan_pass(
                model, corpus, windows, tap=choose_tap(tap, memory), batch_tokens=batch_tokens
            )
            check_match(model, memory, plan.tap)
            kept = gather(
                plan,
                members,
                sizes=grid.sizes,
                temperatures=grid.temperatures,
                folder=None if folder is None else Path(folder),
                most_bytes=most_bytes,
                watch=watch,
                progress=progress,
            )
        documents = _base_sums(plan, kept.base)
        with watch.measure("grid"):
            found = kept.scores.shape[1]
            grid = replace(
                grid,
                temperatures=grid.temperatures or tuple(default_temperatures(kept.scores)),
                ks=tuple(_check_ks(grid.ks, found, members)),
            )
            trials = search_grid(kept, grid, device=model.device)
        carry = "window" if members.reads else "document"
        protocol = protocol_of(plan, windows, documents, memory, Union(), carry)
    best = min(trials, key=_order)
    protocol["merge"] = best.merge.to_dict()
    return Tuning(
        best=best,
        trials=tuple(trials),
        base_perplexity=float(np.exp(sum(documents.nll) / sum(documents.tokens))),
        tokens=sum(documents.tokens),
        at_edge=_edges(best, trials),
        cache_bytes=kept.bytes,
        pass_seconds=watch.seconds["pass"],
        grid_seconds=watch.seconds["grid"],
        protocol=protocol,
        model=model_identity(plan),
        corpus=corpus.describe(),
        versions=versions(),
    )


def with_settings(memory: TokenMemory, trial: Trial) -> TokenMemory:
    """A memory that was tuned, with the settings of a trial.

    Args:
        memory: as `tune` takes it.
        trial: one of its results.
    """
    if isinstance(memory, Together):
        return Together(*(with_settings(member, trial) for member in memory.members))
    if isinstance(memory, LocalMemory):
        return replace(memory, temperature=trial.temperature)
    if isinstance(memory, LongMemory):
        return replace(memory, size=trial.size, temperature=trial.temperature)
    searched: Any = memory
    return searched.changed(trial.k, trial.temperature)


def interpolated(memory: TokenMemory, trial: Trial) -> tuple[TokenMemory, Mixture] | None:
    """What a trial mixes in once more: the store at its own temperature, and its weight."""
    if trial.flat is None:
        return None
    lam, temperature = trial.flat
    searched: Any = Members.of(memory).searched
    return searched.changed(trial.k, temperature), Mixture(lam)


def default_temperatures(scores: Tensor) -> list[float]:
    """1 and `SPREADS` times the median over tokens of (nearest - farthest score).

    Args:
        scores: ``(tokens, k)`` at temperature 1, -inf where there is no neighbour.
    """
    found = ~torch.isneginf(scores)
    spread = scores.amax(1) - scores.masked_fill(~found, torch.inf).amin(1)
    spread = spread[found.any(1)]
    scale = float(spread.median()) if len(spread) else 0.0
    values = {float(f"{scale * factor:.3g}") for factor in SPREADS} if scale > 0 else set()
    return sorted(values | {1.0})


def default_ks(found: int) -> list[int]:
    """All neighbours that were found, and quarters of it down to 4: 4, 16, 64, 256, 1024."""
    return _quarters(found, 4)


def _quarters(largest: int, least: int) -> list[int]:
    values = [largest]
    while values[-1] >= 4 * least:
        values.append(values[-1] // 4)
    return values[::-1]


def _own_temperatures(members: Members) -> list[float]:
    if not members.reads:
        return []  # from the scores, after the pass
    return [float(f"{members.temperature * factor:.4g}") for factor in FACTORS]


def _sizes(members: Members) -> list[int]:
    if members.long is None:
        return [0]
    own = [] if members.long.size == 0 else _quarters(members.long.size, 256)
    return [0, *own] if members.local is not None else own


def _check_grid(grid: Grid, members: Members) -> None:
    check(
        members.long is not None or grid.sizes == (0,),
        f"sizes are those of a long-term memory, got {list(grid.sizes)} without one; tune a "
        "Together with a LongMemory",
    )
    check(
        members.searched is not None or not (grid.ks or grid.interpolations),
        "ks and interpolations are of a store, got them without one; tune a Together with a "
        "KnnMemory",
    )
    check(
        members.local is not None or members.long is None or 0 not in grid.sizes,
        "a long-term memory alone must have a size above 0 in every setting, got 0",
    )


def _check_ks(ks: Sequence[int], found: int, members: Members) -> Sequence[int]:
    memory = members.searched
    if memory is None:
        return (0,)
    # Recomputed scores come in their own order: the best k of an approximate search for more are
    # not what a search for k finds.
    reordered = getattr(memory, "recompute", False) and recall_words(memory.describe()) != EXACT
    for k in ks:
        check(
            1 <= k <= found,
            f"every k to try must lie between 1 and the {found} neighbours that the memory finds, "
            f"got {k}; raise the memory's k",
        )
        check(
            k == found or not reordered,
            f"with recomputed scores of an approximate index only the memory's own k={found} can "
            f"be tried, got {k}; tune one memory per k",
        )
    return ks or ([found] if reordered else default_ks(found))


def _base_sums(plan: Pass, base: TargetPartial) -> DocumentSums:
    """The model's own losses per document."""
    table, corpus = plan.table, plan.corpus
    places = np.concatenate([np.arange(a, b) for a, b in zip(table.first, table.end, strict=True)])
    document = corpus.document_of(places)
    nll = (base.lse.double() - base.target_lse.double()).numpy()
    return document_sums(
        corpus,
        np.bincount(document, weights=nll, minlength=corpus.documents),
        np.bincount(document, minlength=corpus.documents),
    )


def _order(trial: Trial) -> tuple[Any, ...]:
    """By perplexity; among equals the plainer setting first."""
    lam = trial.lam or 0.0
    return trial.perplexity, trial.flat or (), trial.k, trial.size, lam, trial.temperature


def _edges(best: Trial, trials: Sequence[Trial]) -> tuple[str, ...]:
    edges = []
    for name in ("lam", "temperature"):
        values = sorted({getattr(trial, name) for trial in trials} - {None})
        if len(values) > 1 and getattr(best, name) in (values[0], values[-1]):
            edges.append(name)
    for name in ("k", "size"):
        values = {getattr(trial, name) for trial in trials}
        if len(values) > 1 and getattr(best, name) == max(values):
            edges.append(name)
    return tuple(edges)
