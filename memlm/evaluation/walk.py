"""What a memory says about the scored tokens of a text; one with state has to walk there.

A memory without state answers all scored tokens of a batch at once. A memory with state meets the
tokens in order, and it is `carry` that says how far its state goes:

    "document"  for every scored token p of a document:     state = observe(token p-1, key p-1)
                                                             score(key p-1, token p)

The state goes on from window to window. Every scored token is one step, with the key of the window
that scores it; the token that stands before the first one (the begin token, or the document's own
first token) is what came before. Where a rule lets the model's context cross documents, the state
crosses them too, and the text is one document. Documents are walked side by side.

    "window"    for every position t of a window:            state = observe(token t, key t)
                                                             score(key t, token t+1)

The state begins empty in every window and ends with it. Context tokens are walked too, their
answers dropped: so does the model with the memory attached in one forward pass over the window.

A memory of dense keys answers a window's positions in one call instead (`evaluation.by_window`),
and its long-term part, if it has one, goes on to the next window.

Nothing depends on batches, on the order of documents or on how many are walked together, beyond
floating-point rounding. Padding is never shown to a memory.

Differs from the papers' code: knn-transformers walks the rows of a forward call as one sequence, so
its numbers depend on the batch size; fairseq begins anew in every block and walks its scored tokens
only.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.processes import gather
from memlm.core.types import TargetPartial, TokenMemory
from memlm.data.batches import IGNORED
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import WindowTable
from memlm.evaluation.by_window import ask_by_window, deal
from memlm.evaluation.own import OwnEntries
from memlm.evaluation.passes import Pass, Rows, Scored, Stopwatch
from memlm.memory.windows import is_windowed

CARRIES = ("document", "window")
WALK_ROWS = 64
"""Documents walked side by side."""

Integers = NDArray[np.int64]


class Figures:
    """What the steps of a memory cost, summed over all its sequences."""

    def __init__(self) -> None:
        self.steps, self.searches, self.followed = 0, 0, 0.0
        self.known = False

    def add(self, stats: dict[str, Any]) -> None:
        """Add what a memory's ``stats`` says, if it counts steps and searches."""
        if "steps" not in stats or "searches" not in stats:
            return
        self.known = True
        self.steps += stats["steps"]
        self.searches += stats["searches"]
        if legacy := stats.get("foss_legacy"):  # followed / (followed + searches)
            self.followed += stats["searches"] * legacy / (1 - legacy)

    def join(self) -> None:
        """Add what the other processes counted."""
        everywhere = gather((self.steps, self.searches, self.followed, self.known))
        self.steps, self.searches, self.followed, known = map(sum, zip(*everywhere, strict=True))
        self.known = known > 0

    def summary(self) -> dict[str, Any] | None:
        """``steps``, ``searches``, ``saved`` and ``foss_legacy``; None if nothing was counted.

        ``saved`` is the fraction of saved searches, ``1 - searches / steps``. ``foss_legacy`` is
        the number that the papers' code prints: it forgets the steps after the last search of
        every sequence.
        """
        if not self.known or self.steps == 0:
            return None
        recorded = self.followed + self.searches
        return {
            "steps": self.steps,
            "searches": self.searches,
            "saved": 1 - self.searches / self.steps,
            "foss_legacy": self.followed / recorded if recorded else None,
        }


def recall(
    plan: Pass,
    memory: TokenMemory | None,
    watch: Stopwatch,
    figures: Figures,
    *,
    carry: str = "document",
    walk_rows: int = WALK_ROWS,
    own: OwnEntries | None = None,
    skip_above: float | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Rows, TargetPartial | None]]:
    """Every scored token once, with what the memory says about it.

    Args:
        plan: of the pass.
        memory: with or without state; None: there is none, and nothing is said.
        watch: the memory's time goes under ``"memory"``.
        figures: what the steps cost is added here.
        carry: how far state goes, one of `CARRIES`.
        walk_rows: documents walked side by side. Together they hold the keys of one window each
            (of more where windows are short): ``walk_rows * length * dim`` numbers, 100 MB for 64
            windows of 512 tokens, 768 dimensions and float32; and whatever the memory's state is.
        own: what each scored token must not find.
        skip_above: where the model's likeliest token has more than this probability, a memory
            without state is not asked; its searches are counted then.
        share: (i, n) takes every n-th batch from the i-th on, or group of texts that are walked
            side by side: the work of process i of n.
    """
    if memory is None:
        yield from ((scored.rows, None) for scored in plan.run(watch, share=share))
    elif memory.init_state(1) is None:
        for scored in plan.run(watch, share=share):
            with watch.measure("memory"):
                if skip_above is not None:
                    recalled = _ask_where_unsure(plan, memory, scored, figures, skip_above)
                else:
                    asked = memory if own is None else own.without(scored.places)
                    recalled = asked.score(scored.queries, scored.targets, None)[0]
            yield scored.rows, recalled
    elif carry == "window" and is_windowed(memory):
        texts = chains(plan.table, plan.corpus)
        yield from ask_by_window(plan, memory, watch, *texts, walk_rows, share=share)
    elif carry == "window":
        for scored in plan.run(watch, share=share):
            with watch.measure("memory"):
                recalled = _walk_window(memory, scored, plan.table, figures)
            yield scored.rows, recalled
    else:
        first, last = chains(plan.table, plan.corpus)
        lengths = plan.table.end[last - 1] - plan.table.first[first]
        longest = np.argsort(-lengths, kind="stable")
        for group in deal(longest, walk_rows, share):
            yield from _walk_group(plan, memory, watch, figures, first[group], last[group])


def _ask_where_unsure(
    plan: Pass, memory: TokenMemory, scored: Scored, figures: Figures, skip_above: float
) -> TargetPartial:
    """The memory's partial where the model is unsure, an empty one elsewhere."""
    asking = plan.head.confidence(scored.hidden) <= math.log(skip_above)
    searches = int(asking.sum())
    figures.add({"steps": len(asking), "searches": searches})
    answers = torch.full_like(torch.stack(scored.base), -torch.inf)
    if searches:
        found = memory.score(scored.queries[asking], scored.targets[asking], None)[0]
        answers[:, asking] = torch.stack(found).to(answers)
    return TargetPartial(*answers)


def chains(table: WindowTable, corpus: TokenCorpus) -> tuple[Integers, Integers]:
    """Windows that belong together: the state goes on where the text does.

    A window continues the one before it if its first scored token comes right after and is of the
    same document, or the window has context beyond the token just before.

    Returns:
        ``(chains,)`` the first window of each, and one past its last.
    """
    follows = table.first[1:] == table.end[:-1]
    same = corpus.document_of(table.end[:-1] - 1) == table.document[1:]
    reaches = table.begin[1:] < table.first[1:] - 1
    edges = np.flatnonzero(np.concatenate([[True], ~(follows & (same | reaches)), [True]]))
    return edges[:-1], edges[1:]


def carries_over_documents(table: WindowTable, corpus: TokenCorpus) -> bool:
    """Whether a chain of windows reaches from one document into another."""
    first, last = chains(table, corpus)
    return bool((corpus.document_of(table.end[last - 1] - 1) != table.document[first]).any())


class _Text(NamedTuple):
    """Positions to walk, in any order.

    Attributes:
        tokens: ``(positions,)`` int64, what stands there.
        keys: ``(positions, dim)`` tap states there.
        targets: ``(positions,)`` int64, what comes next; -100 where nobody asks.
    """

    tokens: Tensor
    keys: Tensor
    targets: Tensor


class _Walkers:
    """Sequences in lockstep. The longest are first: those that end are always the last rows."""

    def __init__(self, memory: TokenMemory, rows: int, figures: Figures):
        self.memory, self.rows, self.figures = memory, rows, figures
        self.state = memory.init_state(rows)

    def go(self, text: _Text, route: Integers) -> TargetPartial:
        """Walk some steps.

        Args:
            text: where to.
            route: ``(rows, steps)``, the position of each step; -1 from where a row ends.

        Returns:
            The memory's partial, ``(positions,)``.
        """
        device = text.keys.device
        alive, steps = (route >= 0).sum(0), torch.from_numpy(route).to(device)
        dtype = torch.promote_types(text.keys.dtype, torch.float32)
        answers = torch.full((2, len(text.targets)), -torch.inf, dtype=dtype, device=device)
        for step, rows in enumerate(alive.tolist()):
            self.keep(rows)
            here = steps[:rows, step]
            tokens, keys = text.tokens[here], text.keys[here]
            self.state = self.memory.observe(tokens[:, None], keys[:, None], self.state)
            asked = text.targets[here].clamp(min=0)
            partial, self.state = self.memory.score(keys, asked, self.state)
            answers[:, here] = torch.stack(partial).to(answers)
        return TargetPartial(*answers)

    def keep(self, rows: int) -> None:
        """Let go of all but the first ``rows``; what their steps cost is kept."""
        if rows == self.rows:
            return
        every = torch.arange(self.rows)
        ended = self.memory.select_rows(self.state, every[rows:]) if rows else self.state
        self.figures.add(self.memory.stats(ended))
        if rows:
            self.state = self.memory.select_rows(self.state, every[:rows])
        self.rows = rows


def _walk_window(
    memory: TokenMemory, scored: Scored, table: WindowTable, figures: Figures
) -> TargetPartial:
    """Every row of a batch from its first input on, ``(queries,)`` like the scored rows."""
    widths = table.inputs[scored.batch.windows]
    height, width = scored.batch.input_ids.shape
    text = _Text(
        scored.batch.input_ids.flatten(),
        scored.states.flatten(0, 1),
        scored.batch.targets.flatten(),
    )
    place = np.arange(height * width).reshape(height, width)
    route = np.where(np.arange(width) < widths[:, None], place, -1)
    walkers = _Walkers(memory, height, figures)
    answers = walkers.go(text, route[np.argsort(-widths, kind="stable")])
    walkers.keep(0)
    asked = text.targets != IGNORED
    return TargetPartial(answers.lse[asked], answers.target_lse[asked])


def _walk_group(
    plan: Pass,
    memory: TokenMemory,
    watch: Stopwatch,
    figures: Figures,
    window: Integers,
    last: Integers,
) -> Iterator[tuple[Rows, TargetPartial]]:
    """Chains of windows side by side, the longest first.

    Args:
        plan: of the pass.
        memory: with state.
        watch: for the time.
        figures: for the cost.
        window: ``(rows,)`` the first window of each chain.
        last: ``(rows,)`` one past its last.
    """
    table = plan.table
    begin, end = table.first[window], table.end[last - 1]
    lengths = end - begin
    walkers = _Walkers(memory, len(window), figures)
    read, rows, done = begin.copy(), [], 0  # read: one past the last scored token with a key
    while done < lengths[0]:
        idle = np.flatnonzero((read == begin + done) & (read < end))
        many = max(1, plan.batch_tokens // max(1, int(table.inputs[window[idle]].sum())))
        stop = np.minimum(window[idle] + many, last[idle])
        fresh = [np.arange(*span) for span in zip(window[idle], stop, strict=True)]
        window[idle], read[idle] = stop, table.end[stop - 1]
        rows += [scored.rows for scored in plan.run(watch, np.concatenate(fresh))]
        together = Rows.join(rows)
        # All walk until one of them needs a key that nobody has computed yet.
        reach = np.where(read < end, read - begin, lengths[0])
        until = int(reach[lengths > done].min())
        place = begin[:, None] + np.arange(done, until)
        order = np.argsort(together.places)
        route = np.searchsorted(together.places, place, sorter=order).clip(max=len(order) - 1)
        route = np.where(place < end[:, None], order[route], -1)
        with watch.measure("memory"):
            answers = walkers.go(_text(together, plan.corpus), route)
        walked = np.zeros(len(order), bool)
        walked[route[route >= 0]] = True
        rows, done = [], until
        if walked.all():
            yield together, answers
            continue
        chosen = torch.from_numpy(walked).to(answers.lse.device)
        yield together.select(chosen), TargetPartial(*(part[chosen] for part in answers))
        rows = [together.select(~chosen)]
    walkers.keep(0)


def _text(rows: Rows, corpus: TokenCorpus) -> _Text:
    """The scored rows as positions: each is where its target's predecessor stands."""
    tokens = torch.from_numpy(corpus.tokens[rows.places - 1].astype(np.int64))
    return _Text(tokens.to(rows.queries.device), rows.queries, rows.targets)
