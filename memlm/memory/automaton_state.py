"""Where each sequence of a batch stands in the automaton, and how such states are handled.

The state of a row is what its last `read` retrieved (the entries that the next token will be
compared with) and, once that token was observed, the pointers where the next read goes on. It is
plain tensors, so beams copy rows of it, and the states after the last few positions are kept by
reference, so assisted decoding can take tokens back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check


class Counters(NamedTuple):
    """What each sequence has cost, all ``(rows,)`` int64.

    Attributes:
        steps: reads.
        searches: reads that searched.
        last: the step of the last search, counted from 1; 0 before the first.
    """

    steps: Tensor
    searches: Tensor
    last: Tensor


class Past(NamedTuple):
    """What the rows were after an earlier position.

    Attributes:
        entries: ``(earlier rows, width)``, as in `AutomatonState`.
        scores: alike.
        counters: of the earlier rows.
        rows: ``(rows,)`` int64, the earlier row that each row of today was; None: the same.
    """

    entries: Tensor
    scores: Tensor
    counters: Counters
    rows: Tensor | None


class AutomatonState(NamedTuple):
    """Where each sequence stands.

    Attributes:
        entries: ``(rows, width)`` int64, what the last `read` retrieved: found by search first,
            then pointers, then members of their clusters; -1 where there is none.
        scores: ``(rows, width)`` float, their similarity to the query (temperature not applied).
        pointers: ``(rows, pointers)`` int64, the successors of those that agreed with the token
            observed since, best first; -1 padding.
        asleep: ``(rows,)`` bool, rows whose last observed position was padding; None: none.
        counters: what each row has cost.
        history: what `taken_back` may go back to, oldest first.
        length: positions observed, padding included.
    """

    entries: Tensor
    scores: Tensor
    pointers: Tensor
    asleep: Tensor | None
    counters: Counters
    history: tuple[Past, ...]
    length: int


def new_state(rows: int, device: torch.device) -> AutomatonState:
    """Nothing retrieved, no pointer alive."""
    check(rows >= 1, f"rows must be at least 1, got {rows}")
    nothing = torch.empty(rows, 0, dtype=torch.int64, device=device)
    return AutomatonState(
        entries=nothing,
        scores=torch.empty(rows, 0, device=device),
        pointers=nothing,
        asleep=None,
        counters=Counters(*torch.zeros(3, rows, dtype=torch.int64, device=device)),
        history=(),
        length=0,
    )


def stepped(
    state: AutomatonState, pointers: Tensor, asleep: Tensor | None, keep: int
) -> AutomatonState:
    """The state after one more position was observed.

    Args:
        state: before.
        pointers: ``(rows, pointers)`` of this position.
        asleep: ``(rows,)`` bool, where it was padding.
        keep: length of the history.
    """
    past = Past(state.entries, state.scores, state.counters, None)
    return state._replace(
        pointers=pointers,
        asleep=asleep,
        history=(*state.history, past)[-keep:] if keep else (),
        length=state.length + 1,
    )


def retrieved(
    state: AutomatonState, entries: Tensor, scores: Tensor, searched: Tensor | None
) -> AutomatonState:
    """The state after a read; rows that were asleep stay as they were.

    Args:
        state: before.
        entries: ``(rows, width)`` that were retrieved, -1 where there is none.
        scores: their similarity.
        searched: ``(rows,)`` bool; None: no row did.
    """
    counters = _counted(state.counters, searched)
    if state.asleep is not None:
        asleep = state.asleep.unsqueeze(1)
        width = max(entries.shape[1], state.entries.shape[1])
        entries = torch.where(asleep, _widen(state.entries, width, -1), _widen(entries, width, -1))
        before = _widen(state.scores.to(scores), width, -torch.inf)
        scores = torch.where(asleep, before, _widen(scores, width, -torch.inf))
        counters = Counters(
            *(
                torch.where(state.asleep, old, new)
                for old, new in zip(state.counters, counters, strict=True)
            )
        )
    return state._replace(entries=entries, scores=scores, counters=counters)


def _counted(counters: Counters, searched: Tensor | None) -> Counters:
    steps = counters.steps + 1
    if searched is None:
        return counters._replace(steps=steps)
    last = torch.where(searched, steps, counters.last)
    return Counters(steps, counters.searches + searched, last)


def selected(state: AutomatonState, index: Tensor) -> AutomatonState:
    """The state of the rows ``index`` ``(rows,)``; earlier states are only told who is who."""
    history = tuple(
        past._replace(rows=index if past.rows is None else past.rows[index])
        for past in state.history
    )
    return AutomatonState(
        entries=state.entries[index],
        scores=state.scores[index],
        pointers=state.pointers[index],
        asleep=None if state.asleep is None else state.asleep[index],
        counters=Counters(*(counter[index] for counter in state.counters)),
        history=history,
        length=state.length,
    )


def taken_back(state: AutomatonState, length: int) -> AutomatonState:
    """The state after only the first ``length`` positions were observed and read.

    Raises:
        InputError: if fewer were observed, or the history does not reach back so far.
    """
    seen = state.length
    check(0 <= length <= seen, f"length must lie between 0 and {seen}, got {length}")
    if length == seen:
        return state
    fresh = new_state(len(state.entries), state.entries.device)
    if length == 0:
        return fresh
    back = seen - length
    check(
        back <= len(state.history),
        f"at most {len(state.history)} positions can be taken back, got {back}; make the memory "
        f"with history={back} or more",
    )
    past = state.history[-back]
    rows = slice(None) if past.rows is None else past.rows
    return fresh._replace(
        entries=past.entries[rows],
        scores=past.scores[rows],
        counters=Counters(*(counter[rows] for counter in past.counters)),
        history=state.history[:-back],
        length=length,
    )


def _widen(values: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)
