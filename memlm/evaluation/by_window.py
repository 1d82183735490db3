"""Asking a memory window by window: all scored positions of a window in one call.

A memory of dense keys need not walk from token to token (`memlm.memory.windows`). If its answers
stay inside a window, batches of windows are asked as the model reads them. If its state goes on
from window to window (TRIME's long-term memory), texts are read side by side, each in its order:

    batch         the next windows of every text, as many as the model reads at once
    step j        the j-th of them in each text: partial, state = score_window(windows, state)

The model does not wait for the memory: it reads many windows of one text in one batch. TRIME's
code reads one window at a time. A text is a chain of windows, see `memlm.evaluation.walk.chains`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memlm.core.types import TargetPartial
from memlm.data.batches import IGNORED
from memlm.data.windows import Integers, WindowTable
from memlm.evaluation.passes import Pass, Rows, Scored, Stopwatch
from memlm.memory.windows import Window


class _Read(NamedTuple):
    """One window that the model has read.

    Attributes:
        rows: its scored tokens.
        keys: ``(width, dim)`` tap states at its inputs.
        tokens: ``(width,)`` int64, what follows each input.
    """

    rows: Rows
    keys: Tensor
    tokens: Tensor


def ask_by_window(
    plan: Pass,
    memory: Any,
    watch: Stopwatch,
    first: Integers,
    last: Integers,
    together: int,
    *,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Rows, TargetPartial]]:
    """Every scored token once, with what a windowed memory says about it.

    Args:
        plan: of the pass.
        memory: windowed (see `memlm.memory.windows`).
        watch: its time goes under ``"memory"``.
        first: ``(chains,)`` the first window of each text.
        last: ``(chains,)`` one past its last.
        together: texts read side by side.
        share: (i, n) takes every n-th batch or group of texts, from the i-th on.
    """
    if not getattr(memory, "spans_windows", False):
        numbers = np.concatenate([np.arange(*span) for span in zip(first, last, strict=True)])
        for scored in plan.run(watch, numbers, share=share):
            with watch.measure("memory"):
                state = memory.init_state(len(scored.batch.windows))
                partial = memory.score_window(_window(scored, plan.table), state)[0]
            yield scored.rows, partial
        return
    longest = np.argsort(first - last, kind="stable")
    for group in deal(longest, together, share):
        yield from _side_by_side(plan, memory, watch, first[group].copy(), last[group])


def deal(texts: Integers, together: int, share: tuple[int, int]) -> Iterator[Integers]:
    """Groups of at most ``together`` texts, of which (i, n) takes every n-th from the i-th on."""
    for start in range(share[0] * together, len(texts), share[1] * together):
        yield texts[start : start + together]


def _side_by_side(
    plan: Pass, memory: Any, watch: Stopwatch, place: Integers, last: Integers
) -> Iterator[tuple[Rows, TargetPartial]]:
    """Texts in lockstep; those with most windows first, so that the ended ones are the last."""
    state = memory.init_state(len(place))
    while (alive := int((place < last).sum())) > 0:
        state = memory.select_rows(state, torch.arange(alive))
        place, last = place[:alive], last[:alive]
        width = int(plan.table.inputs[place].max())
        many = max(1, plan.batch_tokens // (alive * width))
        stop = np.minimum(place + many, last)
        numbers = np.concatenate([np.arange(*span) for span in zip(place, stop, strict=True)])
        read = {
            number: window
            for scored in plan.run(watch, numbers)
            for number, window in _apart(scored, plan.table)
        }
        for step in range(many):
            going = place[place + step < stop] + step
            if len(going) == 0:
                break
            windows = [read.pop(int(number)) for number in going]
            with watch.measure("memory"):
                state = memory.select_rows(state, torch.arange(len(going)))
                partial, state = memory.score_window(_beside(windows), state)
            yield Rows.join([window.rows for window in windows]), partial
        place = stop


def _window(scored: Scored, table: WindowTable) -> Window:
    """A batch of the model as the memory sees it."""
    ids, targets = scored.batch.input_ids, scored.batch.targets
    asked = targets != IGNORED
    widths = torch.from_numpy(table.inputs[scored.batch.windows]).to(ids.device)
    return Window(
        keys=scored.states,
        tokens=torch.where(asked, targets, ids.roll(-1, dims=1)),
        real=torch.arange(ids.shape[1], device=ids.device) < widths[:, None],
        scored=asked,
        first=int(asked.any(0).int().argmax()),
    )


def _apart(scored: Scored, table: WindowTable) -> Iterator[tuple[int, _Read]]:
    """The windows of a batch, one by one."""
    window, numbers = _window(scored, table), scored.batch.windows
    ends = np.cumsum(table.targets[numbers])
    for row, number in enumerate(numbers.tolist()):
        width, end = int(table.inputs[number]), int(ends[row])
        part = slice(end - int(table.targets[number]), end)
        rows = Rows(
            base=TargetPartial(*(half[part] for half in scored.base)),
            queries=scored.queries[part],
            targets=scored.targets[part],
            places=scored.places[part],
            windows=scored.windows[part],
        )
        yield number, _Read(rows, window.keys[row, :width], window.tokens[row, :width])


def _beside(windows: list[_Read]) -> Window:
    """Windows side by side, padded on the right."""
    device = windows[0].keys.device
    widths = torch.tensor([len(window.tokens) for window in windows], device=device)
    counts = torch.tensor([len(window.rows.targets) for window in windows], device=device)
    place = torch.arange(int(widths.max()), device=device)
    real = place < widths[:, None]
    scored = real & (place >= (widths - counts)[:, None])
    return Window(
        keys=_pad([window.keys for window in windows]),
        tokens=_pad([window.tokens for window in windows]),
        real=real,
        scored=scored,
        first=int((widths - counts).min()),
    )


def _pad(parts: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
