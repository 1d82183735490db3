"""The long-term memory: hidden states of the text before this window, and what followed them.

    candidates of a position:  (h_i, x_{i+1}) of the last `size` positions scored in earlier windows
    score = h . h_i / temperature                    (Zhong et al. 2022, section 3; sqrt(dim) there)

The text is read in windows (a model's context; one call of ``generate``). While a window is read
its pairs are collected; `finish` makes them part of the memory. Keys stay what they were when the
window was read: nothing is encoded again. With `LocalMemory`, which holds the present window, it
makes TRIME's local and long-term memory (see `memlm.memory.together`).

Windows overlap: their context was scored before, so its pairs are in the local memory, encoded
anew, *and* among the last of the long one. ``overlap="once"`` leaves the long one's out; "twice"
keeps them, as TRIME's code does and the published figures count them.

Differs from TRIME's code: one memory for each of many texts, side by side.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.types import Candidates, TargetPartial
from memlm.index.metrics import check_choice
from memlm.memory.knn import check_temperature
from memlm.memory.local import LocalMemory, LocalState
from memlm.memory.pairs import pair_candidates
from memlm.memory.windows import Window, score_bank
from memlm.ops.bank import Places, earlier_in_stream
from memlm.ops.tokens import target_partial

Overlap = Literal["once", "twice"]
_PRESENT = LocalMemory(size=1)  # keeps what is read of the window; never asked


class LongState(NamedTuple):
    """What was read before, and what of the present window was read so far.

    Attributes:
        keys: ``(rows, entries, dim)`` of earlier windows, oldest first.
        tokens: ``(rows, entries)`` int64, what followed them.
        real: ``(rows, entries)`` bool, False where a row has fewer entries; those come first.
        present: the window so far.
    """

    keys: Tensor
    tokens: Tensor
    real: Tensor
    present: LocalState


@dataclass(frozen=True)
class LongMemory(Config):
    """Earlier windows of the text as candidates.

    Attributes:
        size: how many pairs are kept.
        temperature: what scores are divided by; TRIME's is ``sqrt(dim)`` times about 1.2.
        overlap: whether pairs of the window's own context count "once" or "twice".
    """

    size: int = 12288
    temperature: float = 1.0
    overlap: Overlap = "once"

    def __post_init__(self):
        check(self.size >= 0, f"size must not be negative, got {self.size}")
        check_temperature(self.temperature)
        check_choice("overlap", self.overlap, ("once", "twice"))

    def init_state(self, rows: int) -> LongState:
        """Nothing read yet."""
        present = _PRESENT.init_state(rows)
        return LongState(present.keys, present.tokens, present.valid, present)

    def observe(
        self, tokens: Tensor, keys: Tensor, state: LongState, valid: Tensor | None = None
    ) -> LongState:
        """Collect what came; it becomes a candidate when the window is finished.

        Args:
            tokens: ``(rows, time)`` int64.
            keys: ``(rows, time, dim)`` hidden states at them.
            state: so far.
            valid: ``(rows, time)`` bool, False on padding; None: all real.

        Raises:
            InputError: if shapes do not fit each other or the state.
        """
        return state._replace(present=_PRESENT.observe(tokens, keys, state.present, valid))

    def finish(self, state: LongState) -> LongState:
        """The state at the beginning of the next window: what was collected is remembered."""
        present = state.present
        if present.length == 0:
            return state
        real = present.valid[:, :-1] & present.valid[:, 1:]
        keys, tokens = present.keys[:, :-1], present.tokens[:, 1:]
        return self._remember(state, keys, tokens, real)

    @torch.no_grad()
    def read(self, query: Tensor, state: LongState) -> tuple[Candidates, LongState]:
        """The pairs of earlier windows.

        Args:
            query: ``(rows, dim)``.
            state: so far.

        Returns:
            Candidates ``(rows, entries)``, oldest first; one that is not valid if there are none.

        Raises:
            InputError: if the query does not fit the state.
        """
        candidates = pair_candidates(
            query,
            state.keys,
            state.tokens,
            state.real,
            metric="ip",
            temperature=self.temperature,
        )
        return candidates, state

    def score(
        self, query: Tensor, targets: Tensor, state: LongState
    ) -> tuple[TargetPartial, LongState]:
        """The memory's mass, and the part of it on known next tokens; see `TokenMemory`."""
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    @property
    def reads_leave_state(self) -> bool:
        """Positions that nobody asks about need not be read."""
        return True

    @property
    def windowed(self) -> bool:
        """Whole windows can be scored at once."""
        return True

    @property
    def spans_windows(self) -> bool:
        """Its state goes on from window to window: they must come in the order of the text."""
        return True

    def score_window(self, window: Window, state: LongState) -> tuple[TargetPartial, LongState]:
        """What earlier windows say about the scored tokens of these, which are then remembered.

        Args:
            window: the positions.
            state: after the windows before.

        Returns:
            ``(scored,)`` partial, and the state after these windows.
        """
        return self.ask_window(window, state), self.remember_window(window, state)

    @torch.no_grad()
    def ask_window(self, window: Window, state: LongState) -> TargetPartial:
        """The first half of `score_window`: ``(scored,)``, from the state before."""
        rows, entries = state.tokens.shape
        asked = window.tokens[:, window.first :]
        if entries == 0:
            dtype = torch.promote_types(window.keys.dtype, torch.float32)
            nothing = torch.full(
                (len(window.targets),), -torch.inf, dtype=dtype, device=window.keys.device
            )
            return TargetPartial(nothing, nothing)
        place = torch.arange(entries, device=asked.device).expand(rows, entries)
        zeros = torch.zeros_like(place)
        # what is hidden of each row: the pairs of its context, which the local memory holds
        context = (window.real & ~window.scored).sum(-1, keepdim=True)
        hidden = context if self.overlap == "once" else torch.zeros_like(context)
        sees = (entries - hidden).expand(asked.shape)
        same = torch.zeros_like(asked)
        return score_bank(
            window,
            state.keys.to(window.keys),
            state.tokens,
            state.real,
            Places(zeros, zeros, place),
            Places(same, same, sees),
            earlier_in_stream,
            self.temperature,
        )

    @torch.no_grad()
    def remember_window(self, window: Window, state: LongState) -> LongState:
        """The second half: the state after these windows."""
        return self._remember(state, window.keys, window.tokens, window.scored)

    def select_rows(self, state: LongState, index: Tensor) -> LongState:
        """The state of the rows ``index``, copied or dropped."""
        index = index.to(state.tokens.device)
        return LongState(
            state.keys[index],
            state.tokens[index],
            state.real[index],
            _PRESENT.select_rows(state.present, index),
        )

    def crop(self, state: LongState, length: int) -> LongState:
        """The state after only the first ``length`` tokens of the present window.

        Raises:
            InputError: if fewer were observed.
        """
        return state._replace(present=_PRESENT.crop(state.present, length))

    def stats(self, state: LongState) -> dict[str, Any]:
        """Candidates of the next read."""
        entries = int(state.real.sum(-1).max()) if state.real.numel() else 0
        return {"entries": entries, "searches_per_position": 0, "off": entries == 0}

    def describe(self) -> dict[str, Any]:
        """The settings."""
        return {
            "memory": "long",
            "size": self.size,
            "temperature": self.temperature,
            "overlap": self.overlap,
        }

    def _remember(self, state: LongState, keys: Tensor, tokens: Tensor, real: Tensor) -> LongState:
        """The last `size` real pairs of each row, at the end of the columns."""
        if state.tokens.shape[1]:
            keys = torch.cat([state.keys, keys.to(state.keys)], dim=1)
            tokens = torch.cat([state.tokens, tokens.to(state.tokens.device)], dim=1)
            real = torch.cat([state.real, real.to(state.real.device)], dim=1)
        most = min(self.size, int(real.sum(-1).max()))
        # stable: real pairs keep their order and move behind the others
        order = torch.argsort(real.to(torch.int8), dim=1, stable=True)
        order = order[:, order.shape[1] - most :]
        rows = torch.arange(len(order), device=order.device)[:, None]
        present = _PRESENT.init_state(len(order))
        return LongState(
            keys[rows, order].detach(), tokens[rows, order], real[rows, order], present
        )
