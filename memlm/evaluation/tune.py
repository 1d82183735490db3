"""Tuning a memory: one pass over the text, then the whole grid in seconds.

The weight lam, the temperature T and the number of neighbours k of a kNN-LM depend on the model (T
divides *squared* distances, whose size grows with the width of the keys) and on how close the
datastore is to the text. None of the three changes which neighbours are nearest. So one pass keeps,
for every scored token, the model's partial (lse, target_lse), the neighbours' scores s_1 ... s_K at
temperature 1, nearest first, and one bit each: does the neighbour propose the token that came?

    log p_memory(y; T, k) = logsumexp_{j <= k, match_j} s_j / T  -  logsumexp_{j <= k} s_j / T
    p(y; lam, T, k)       = (1 - lam) p_model(y) + lam p_memory(y; T, k)      (kNN-LM, eq. 3)

Then hundreds of settings cost a few sums each: no model, no search. The kept neighbours take
5 bytes each (a float32 and a bool).

The best setting is chosen *on this text* and is therefore optimistic here: tune on development
text, report on other text. A best value at the edge of the grid is named, because a better one may
lie beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.core.errors import InputError
from memlm.core.files import read_json, write_json
from memlm.core.merges import Mixture
from memlm.core.progress import bar
from memlm.core.threads import torch_threads
from memlm.core.types import TargetPartial, TokenMemory
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows
from memlm.evaluation.passes import Pass, Stopwatch, log_probabilities, plan_pass
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
from memlm.models.attach import MemoryForCausalLM
from memlm.models.match import check_match
from memlm.models.running import frozen
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.merge import mixture

LAMS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SPREADS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Default temperatures: these times the median of (nearest score - farthest score), and 1."""

MOST_BYTES = 8 << 30
_CHUNK = 1 << 22  # neighbours whose weights are computed at once


@dataclass(frozen=True)
class Trial(Config):
    """One setting and what it gave.

    Attributes:
        lam: weight of the memory.
        temperature: divisor of the neighbours' scores.
        k: neighbours used.
        perplexity: token-weighted.
    """

    lam: float
    temperature: float
    k: int
    perplexity: float


@dataclass(frozen=True)
class Tuning(Config):
    """The result of `tune`; JSON in and out.

    Attributes:
        best: the setting with the lowest perplexity; among equals, the smaller k, lam, temperature.
        trials: all settings.
        base_perplexity: of the model alone.
        tokens: how many were scored.
        at_edge: which of lam, temperature and k are best at the edge of their grid, so that a
            better value may lie beyond it.
        cache_bytes: what the kept neighbours took.
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
    def merge(self) -> Mixture:
        """The best merge."""
        return Mixture(self.best.lam)

    def describe(self) -> str:
        """The result in one line."""
        best = self.best
        edge = f"; at the edge of the grid: {', '.join(self.at_edge)}" if self.at_edge else ""
        return (
            f"best of {len(self.trials)} settings: lam={best.lam:g} temperature="
            f"{best.temperature:g} k={best.k}, perplexity {best.perplexity:.4g} (model alone "
            f"{self.base_perplexity:.4g}) over {self.tokens:,} tokens, chosen on this text{edge}"
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


class Neighbours(NamedTuple):
    """What one pass keeps, for every scored token.

    Attributes:
        base: ``(tokens,)`` float32, the model's partial.
        scores: ``(tokens, k)`` float32 at temperature 1, in the memory's order, -inf where none.
        matches: ``(tokens, k)`` bool, whether the neighbour proposes the token that came.
    """

    base: TargetPartial
    scores: Tensor
    matches: Tensor

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(part.nbytes for part in (*self.base, self.scores, self.matches))


def tune(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: Windows,
    memory: TokenMemory,
    *,
    lams: Sequence[float] = LAMS,
    temperatures: Sequence[float] | None = None,
    ks: Sequence[int] | None = None,
    tap: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    threads: int | None = None,
    most_bytes: int = MOST_BYTES,
    progress: bool = True,
) -> Tuning:
    """Find the best (lam, temperature, k) of a memory on a text.

    Args:
        model: causal language model.
        corpus: development text, tokens of the model's tokenizer.
        windows: the rule that cuts it.
        memory: without state, with a ``temperature``; its own k is the largest that can be tried.
        lams: weights to try, between 0 and 1.
        temperatures: divisors to try; None: `SPREADS` times the median spread of scores, and 1.
        ks: numbers of neighbours to try; None: all that were found, and quarters of it down to 4.
        tap: as in `evaluate`.
        batch_tokens: as in `evaluate`.
        threads: as in `evaluate`.
        most_bytes: refuse to keep more than this.
        progress: show a bar for work over two seconds.

    Raises:
        InputError: for a memory with state or without temperature, a grid out of range, or more
            neighbours than ``most_bytes`` can hold; and as `evaluate`.
    """
    check(
        not isinstance(model, MemoryForCausalLM),
        "tuning needs the model alone and the memory beside it, got a model with a memory "
        "attached; pass model.detach() and model.memory",
    )
    temperature = _tunable(memory)
    check(len(lams) > 0, "the grid must have at least one lam, got none")
    for lam in lams:
        check(0 < lam < 1, f"every lam to try must lie between 0 and 1, both excluded, got {lam}")
    for value in temperatures or ():
        check(value > 0, f"every temperature to try must be above 0, got {value}")
    watch = Stopwatch(model.device)
    with frozen(model), torch_threads(threads):
        with watch.measure("pass"):
            plan = plan_pass(
                model, corpus, windows, tap=choose_tap(tap, memory), batch_tokens=batch_tokens
            )
            check_match(model, memory, plan.tap)
            kept = _gather(plan, memory, temperature, most_bytes, watch, progress)
        documents = _base_sums(plan, kept.base)
        with watch.measure("grid"):
            found = kept.scores.shape[1]
            trials = search_grid(
                kept,
                lams,
                temperatures or default_temperatures(kept.scores),
                _check_ks(ks, found, memory),
                device=model.device,
            )
        protocol = protocol_of(plan, windows, documents, memory, Mixture(lams[0]))
    best = min(trials, key=lambda trial: (trial.perplexity, trial.k, trial.lam, trial.temperature))
    protocol["merge"] = Mixture(best.lam).to_dict()
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


def search_grid(
    kept: Neighbours,
    lams: Sequence[float],
    temperatures: Sequence[float],
    ks: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> list[Trial]:
    """The perplexity of every setting, ordered by k, temperature, lam.

    Args:
        kept: from one pass.
        lams: weights in [0, 1].
        temperatures: above 0.
        ks: at least 1 and at most what was kept.
        device: where to compute.
    """
    tokens, width = kept.scores.shape
    losses = {}
    for start in range(0, tokens, max(1, _CHUNK // max(width, 1))):
        rows = slice(start, start + max(1, _CHUNK // max(width, 1)))
        base = TargetPartial(*(part[rows].to(device) for part in kept.base))
        scores, matches = kept.scores[rows].to(device), kept.matches[rows].to(device)
        hits = scores.masked_fill(~matches, -torch.inf)
        for k in ks:
            for temperature in temperatures:
                partial = TargetPartial(
                    lse=safe_logsumexp(scores[:, :k] / temperature),
                    target_lse=safe_logsumexp(hits[:, :k] / temperature),
                )
                for lam in lams:
                    merged = mixture(lam, base, partial)
                    loss = (merged.lse.double() - merged.target_lse.double()).sum()
                    setting = (k, temperature, lam)
                    losses[setting] = losses.get(setting, 0.0) + float(loss)
    return [
        Trial(lam=lam, temperature=temperature, k=k, perplexity=float(np.exp(loss / tokens)))
        for (k, temperature, lam), loss in losses.items()
    ]


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
    values = [found]
    while values[-1] >= 16:
        values.append(values[-1] // 4)
    return values[::-1]


def _gather(
    plan: Pass,
    memory: TokenMemory,
    temperature: float,
    most_bytes: int,
    watch: Stopwatch,
    progress: bool,
) -> Neighbours:
    """The one pass: scores, matches and the model's partial, tokens in text order."""
    counts = plan.table.targets
    tokens, start = int(counts.sum()), np.cumsum(counts) - counts
    kept = Neighbours(TargetPartial(*torch.empty(2, 0)), torch.empty(0, 0), torch.empty(0, 0))
    with bar(tokens, label="neighbours", unit="token", quiet=not progress) as shown:
        for scored in plan.run(watch):
            log_probabilities(scored.base, scored.places, plan.corpus)
            candidates, _ = memory.read(scored.queries, None)
            if len(kept.scores) == 0:
                kept = _empty(tokens, candidates.scores.shape[1], most_bytes)
            place = torch.from_numpy(
                start[scored.windows] + scored.places - plan.table.first[scored.windows]
            )
            scores = (candidates.scores.float() * temperature).masked_fill(
                ~candidates.valid, -torch.inf
            )
            matches = (candidates.tokens == scored.targets[:, None]) & candidates.valid
            kept.base.lse[place] = scored.base.lse.float().cpu()
            kept.base.target_lse[place] = scored.base.target_lse.float().cpu()
            kept.scores[place] = scores.cpu()
            kept.matches[place] = matches.cpu()
            shown.update(len(place))
    return kept


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


def _empty(tokens: int, k: int, most_bytes: int) -> Neighbours:
    needed = tokens * (8 + 5 * k)
    check(
        needed <= most_bytes,
        f"the neighbours of {tokens:,} tokens with k={k} take {needed / 1e9:.3g} GB, more than "
        f"the {most_bytes / 1e9:.3g} GB allowed; tune on less text, lower the memory's k, or raise "
        "most_bytes",
    )
    return Neighbours(
        base=TargetPartial(torch.empty(tokens), torch.empty(tokens)),
        scores=torch.empty(tokens, k),
        matches=torch.empty(tokens, k, dtype=torch.bool),
    )


def _tunable(memory: TokenMemory) -> float:
    if memory.init_state(1) is not None:
        raise InputError(
            "tuning keeps the neighbours of every token, so the memory must not carry state, but "
            f"{type(memory).__name__} does; tune the kNN memory of the same store"
        )
    temperature = getattr(memory, "temperature", None)
    if not isinstance(temperature, int | float):
        raise InputError(
            f"a memory to tune must have a number as its temperature, but {type(memory).__name__} "
            f"has {temperature!r}; tune a kNN memory"
        )
    return float(temperature)


def _check_ks(ks: Sequence[int] | None, found: int, memory: TokenMemory) -> Sequence[int]:
    # Recomputed scores come in their own order: the best k of an approximate search for more are
    # not what a search for k finds.
    reordered = getattr(memory, "recompute", False) and recall_words(memory.describe()) != EXACT
    for k in ks or ():
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


def _edges(best: Trial, trials: Sequence[Trial]) -> tuple[str, ...]:
    edges = []
    for name in ("lam", "temperature"):
        values = sorted({getattr(trial, name) for trial in trials})
        if len(values) > 1 and getattr(best, name) in (values[0], values[-1]):
            edges.append(name)
    ks = {trial.k for trial in trials}
    if len(ks) > 1 and best.k == max(ks):
        edges.append("k")
    return tuple(edges)
