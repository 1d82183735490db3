"""What one pass over a text must keep so that settings of a memory can be tried afterwards.

Temperature, memory size, number of neighbours and weight change neither the hidden states nor which
neighbours are nearest. So for every scored token it is enough to keep

    base     the model's partial (lse, target_lse)
    past     the partial of local and long-term memory, for each size and temperature to be tried
    scores   of the K neighbours of a store at temperature 1, nearest first
    matches  one bit each: does the neighbour propose the token that came?

Partials of dense memories are kept per temperature, because all their scores would be tokens x
entries. Neighbours take 5 bytes each (a float32 and a bool), and any temperature and any k up to K
can be read off them.

In a folder the statistics survive: the text is cut into parts where no state goes on (between
documents), and each finished part is a file. The folder's name is the fingerprint of all that they
depend on (model, text, windows, tap, memories and their grid), so others lie beside them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.files import fingerprint, remove_temporaries, write_atomic, write_json
from memlm.core.progress import bar
from memlm.core.types import TargetPartial, TokenMemory
from memlm.data.windows import Integers
from memlm.evaluation.by_window import ask_by_window
from memlm.evaluation.passes import Pass, Rows, Stopwatch, log_probabilities
from memlm.evaluation.walk import WALK_ROWS, chains
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory, LongState
from memlm.memory.together import Together
from memlm.memory.windows import Window
from memlm.models.fingerprint import model_hash
from memlm.ops.merge import union

PART_TOKENS = 1 << 16
"""Scored tokens of a part, at least, unless one text is longer."""


class Statistics(NamedTuple):
    """Everything that trying settings needs, for every scored token in text order.

    Attributes:
        base: ``(tokens,)`` float32, the model's partial.
        past: ``(tokens, sizes, temperatures)`` float32, the partial of what was read before; no
            sizes if there is no such memory.
        scores: ``(tokens, k)`` float32 at temperature 1, in the memory's order, -inf where none;
            k is 0 without a store.
        matches: ``(tokens, k)`` bool, whether the neighbour proposes the token that came.
        weights: ``(tokens, k)`` float32, logarithms of the neighbours' weights, which no
            temperature divides; no columns unless the store was pruned.
    """

    base: TargetPartial
    past: TargetPartial
    scores: Tensor
    matches: Tensor
    weights: Tensor

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(part.nbytes for part in _flatten(self).values())


class Members(NamedTuple):
    """A memory by its kinds.

    Attributes:
        local: of the window, or None.
        long: of the windows before, or None.
        searched: a memory without state, or None.
    """

    local: LocalMemory | None
    long: LongMemory | None
    searched: TokenMemory | None

    @property
    def reads(self) -> bool:
        """Whether any of them remembers the text that is read."""
        return self.local is not None or self.long is not None

    @property
    def temperature(self) -> float:
        """Of the first; all share one in the papers."""
        return next(member.temperature for member in self if member is not None)  # type: ignore[attr-defined]

    @classmethod
    def of(cls, memory: TokenMemory) -> "Members":
        """The members of a memory, each of which has its own kind of statistics.

        Raises:
            InputError: for a memory that has to walk, or two of one kind.
        """
        check(
            getattr(memory, "lams", None) is None,
            "members with weights of their own are normalised apart, so they are tuned one by one; "
            "got a Together with lams",
        )
        found: dict[str, Any] = {}
        for member in memory.members if isinstance(memory, Together) else (memory,):
            if isinstance(member, LocalMemory):
                kind = "local"
                check(
                    member.windowed,
                    f"a local memory to tune must score whole windows, got metric "
                    f"{member.metric!r}; use 'ip'",
                )
            elif isinstance(member, LongMemory):
                kind = "long"
            elif member.init_state(1) is None:
                kind = "searched"
            else:
                raise InputError(
                    "tuning keeps what does not change with the settings, so a memory must not "
                    f"carry state from token to token, but {type(member).__name__} does; tune the "
                    "kNN memory of the same store"
                )
            check(kind not in found, f"a memory to tune must have one {kind} member, got two")
            if not isinstance(getattr(member, "temperature", None), int | float):
                raise InputError(
                    "a memory to tune must have a number as its temperature, but "
                    f"{type(member).__name__} has {getattr(member, 'temperature', None)!r}; tune a "
                    "kNN memory"
                )
            found[kind] = member
        return cls(found.get("local"), found.get("long"), found.get("searched"))


class PastGrid:
    """Local and long-term memory at several sizes and temperatures, as one windowed memory.

    Args:
        members: at least one that reads.
        sizes: of the long-term memory; 0 is the local memory alone.
        temperatures: to try.
    """

    def __init__(self, members: Members, sizes: tuple[int, ...], temperatures: tuple[float, ...]):
        self.sizes, self.temperatures = sizes, temperatures
        self.spans_windows = members.long is not None
        self._local = [
            replace(members.local, temperature=temperature)
            for temperature in temperatures
            if members.local is not None
        ]
        self._long = [
            [replace(members.long, size=size, temperature=value) for value in temperatures]
            for size in sizes
            if members.long is not None
        ]

    def init_state(self, rows: int) -> tuple[LongState, ...]:
        """One state for each size, whatever the temperature is."""
        return tuple(memories[0].init_state(rows) for memories in self._long)

    def select_rows(self, state: tuple[LongState, ...], index: Tensor) -> tuple[LongState, ...]:
        """The state of the rows ``index``."""
        return tuple(
            memories[0].select_rows(own, index)
            for memories, own in zip(self._long, state, strict=True)
        )

    def score_window(
        self, window: Window, state: tuple[LongState, ...]
    ) -> tuple[TargetPartial, tuple[LongState, ...]]:
        """``(scored, sizes, temperatures)``, and the state after these windows."""
        near = [memory.score_window(window, None)[0] for memory in self._local]  # type: ignore[arg-type]
        if not self._long:
            return _grid([near]), state
        far = [
            [memory.ask_window(window, own) for memory in memories]
            for memories, own in zip(self._long, state, strict=True)
        ]
        if near:
            far = [[union(*pair) for pair in zip(near, row, strict=True)] for row in far]
        after = tuple(
            memories[0].remember_window(window, own)
            for memories, own in zip(self._long, state, strict=True)
        )
        return _grid(far), after


def _grid(rows: list[list[TargetPartial]]) -> TargetPartial:
    """Partials by size and temperature as one, ``(scored, sizes, temperatures)``."""
    halves = [[torch.stack(half, -1) for half in zip(*row, strict=True)] for row in rows]
    return TargetPartial(*(torch.stack(half, -2) for half in zip(*halves, strict=True)))


def gather(
    plan: Pass,
    members: Members,
    *,
    sizes: tuple[int, ...] = (),
    temperatures: tuple[float, ...] = (),
    folder: Path | None = None,
    most_bytes: int,
    watch: Stopwatch,
    progress: bool = True,
) -> Statistics:
    """The one pass, or what is left of it.

    Args:
        plan: of the pass; the caller keeps gradients off and the model in evaluation mode.
        members: the memory.
        sizes: of the long-term memory; ignored without one that reads.
        temperatures: of what was read before; alike.
        folder: where finished parts are kept; None: nowhere.
        most_bytes: refuse to keep more than this.
        watch: times the model and the memory.
        progress: show a bar for work over two seconds.

    Raises:
        InputError: if the statistics are larger than ``most_bytes``.
    """
    grid = PastGrid(members, sizes, temperatures) if members.reads else None
    tokens = int(plan.table.targets.sum())
    cells = len(sizes) * len(temperatures) if members.reads else 0
    k = int(getattr(members.searched, "k", 0)) if members.searched is not None else 0
    check_size(tokens, k, cells, most_bytes)
    if folder is not None:
        about = _identity(plan, members, sizes, temperatures)
        folder = folder / fingerprint(about).split(":")[-1][:16]
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        write_json(folder / "statistics.json", about)
    parts = []
    with bar(tokens, label="statistics", unit="token", quiet=not progress) as shown:
        for number, (first, last) in enumerate(_parts(plan)):
            place = None if folder is None else folder / f"part-{number:05d}.safetensors"
            if place is not None and place.exists():
                part = _unflatten(load(place.read_bytes()))
                shown.update(len(part.base.lse))
            else:
                part = _gather_part(plan, members, grid, first, last, watch, shown, most_bytes)
                if place is not None:
                    data = save(_flatten(part))
                    write_atomic(place, lambda file, data=data: file.write(data))
            parts.append(_flatten(part))
    return _unflatten({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def check_size(tokens: int, k: int, cells: int, most_bytes: int) -> None:
    """Raise InputError if the statistics take more than ``most_bytes``."""
    needed = tokens * (8 + 5 * k + 8 * cells)
    check(
        needed <= most_bytes,
        f"the statistics of {tokens:,} tokens with k={k} and {cells} settings of the past take "
        f"{needed / 1e9:.3g} GB, more than the {most_bytes / 1e9:.3g} GB allowed; tune on less "
        "text, lower the memory's k, or raise most_bytes",
    )


def _parts(plan: Pass) -> Iterator[tuple[Integers, Integers]]:
    """Chains of windows, as many together as hold `PART_TOKENS` scored tokens."""
    first, last = chains(plan.table, plan.corpus)
    counts = np.add.reduceat(plan.table.targets, first)
    start = held = 0
    for chain, count in enumerate(counts.tolist()):
        held += count
        if held >= PART_TOKENS or chain == len(counts) - 1:
            yield first[start : chain + 1], last[start : chain + 1]
            start, held = chain + 1, 0


def _gather_part(
    plan: Pass,
    members: Members,
    grid: PastGrid | None,
    first: Integers,
    last: Integers,
    watch: Stopwatch,
    shown: Any,
    most_bytes: int,
) -> Statistics:
    """The statistics of some chains, which follow each other."""
    counts = plan.table.targets[first[0] : last[-1]]
    tokens, start = int(counts.sum()), np.cumsum(counts) - counts
    kept: dict[str, Tensor] = {}
    for rows, past in _ask(plan, grid, first, last, watch):
        log_probabilities(rows.base, rows.places, plan.corpus)
        place = torch.from_numpy(
            start[rows.windows - first[0]] + rows.places - plan.table.first[rows.windows]
        )
        with watch.measure("memory"):
            found = _flatten(_said(rows, past, members.searched))
        if not kept:
            check_size(
                int(plan.table.targets.sum()),
                found["scores"].shape[1],
                found["past_lse"][0].numel(),
                most_bytes,
            )
            kept = {
                name: torch.empty(tokens, *part.shape[1:], dtype=part.dtype)
                for name, part in found.items()
            }
        for name, part in found.items():
            kept[name][place] = part.to("cpu", kept[name].dtype)
        shown.update(len(place))
    return _unflatten(kept)


def _ask(
    plan: Pass, grid: PastGrid | None, first: Integers, last: Integers, watch: Stopwatch
) -> Iterator[tuple[Rows, TargetPartial | None]]:
    if grid is not None:
        yield from ask_by_window(plan, grid, watch, first, last, WALK_ROWS)
        return
    for scored in plan.run(watch, np.arange(first[0], last[-1])):
        yield scored.rows, None


def _said(rows: Rows, past: TargetPartial | None, searched: TokenMemory | None) -> Statistics:
    """The statistics of some rows."""
    count = len(rows.targets)
    nothing = rows.queries.new_empty(count, 0, dtype=torch.float32)
    scores, matches, weights = nothing, nothing.bool(), nothing
    if searched is not None:
        candidates, _ = searched.read(rows.queries, None)
        if (logarithms := getattr(searched, "weights", None)) is not None:
            ids = candidates.ids.clamp(min=0).to(logarithms.device)
            weights = logarithms[ids].to(candidates.scores)
        scores = candidates.scores.float()
        scores = (scores - weights) if weights.shape[1] else scores
        temperature: Any = searched.temperature  # type: ignore[attr-defined]
        scores = (scores * temperature).masked_fill(~candidates.valid, -torch.inf)
        matches = (candidates.tokens == rows.targets[:, None]) & candidates.valid
    if past is None:
        past = TargetPartial(*nothing.new_empty(2, count, 0, 0))
    return Statistics(
        TargetPartial(*(half.float() for half in rows.base)),
        TargetPartial(*(half.float() for half in past)),
        scores,
        matches,
        weights,
    )


def _flatten(kept: Statistics) -> dict[str, Tensor]:
    return {
        "base_lse": kept.base.lse,
        "base_target": kept.base.target_lse,
        "past_lse": kept.past.lse,
        "past_target": kept.past.target_lse,
        "scores": kept.scores,
        "matches": kept.matches,
        "weights": kept.weights,
    }


def _unflatten(tensors: dict[str, Tensor]) -> Statistics:
    return Statistics(
        TargetPartial(tensors["base_lse"], tensors["base_target"]),
        TargetPartial(tensors["past_lse"], tensors["past_target"]),
        tensors["scores"],
        tensors["matches"],
        tensors["weights"],
    )


def _identity(
    plan: Pass, members: Members, sizes: tuple[int, ...], temperatures: tuple[float, ...]
) -> dict[str, Any]:
    """All that the statistics depend on; the settings that are tried later are not among it."""
    table = plan.table
    searched = members.searched
    about = {} if searched is None else {**searched.describe(), "temperature": 1.0}
    local = None if members.local is None else replace(members.local, temperature=1.0)
    long = None if members.long is None else replace(members.long, size=0, temperature=1.0)
    return {
        "format_version": 1,
        "model": model_hash(plan.model),
        "tap": plan.tap.to_dict(),
        "corpus": plan.corpus.describe(),
        "windows": fingerprint([column.tolist() for column in table]),
        "part_tokens": PART_TOKENS,
        "batch_tokens": plan.batch_tokens,
        "local": None if local is None else local.to_dict(),
        "long": None if long is None else long.to_dict(),
        "searched": about,
        "store": getattr(getattr(searched, "store", None), "fingerprint", None),
        "sizes": list(sizes) if members.reads else [],
        "temperatures": list(temperatures) if members.reads else [],
    }
