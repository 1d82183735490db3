"""The local memory: what followed similar hidden states earlier in this very text.

    candidates of position t:  (h_i, x_{i+1}) for i < t,   score = sim(h_t, h_i) / temperature

This is the continuous cache (Grave et al. 2017, eq. 3, sim = dot product and temperature = 1 /
theta) and TRIME's local memory (Zhong et al. 2022, eq. 3, dot product and temperature =
sqrt(dim)). It needs no datastore, and is the plainest memory with a state:

    state = the tokens and hidden states seen so far, per row

so beams copy rows, taking back tokens cuts the end, and `read` looks at the last `size` pairs. The
state grows with the text like the model's own key-value cache, one hidden state per token, because
only then can any number of tokens be taken back.

Where whole windows are scored (`memlm.memory.windows`), the text is the window: all its positions
are asked at once, and nothing is kept.

Differs from the papers' code: a row without a past has no candidate, instead of a zero key.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.types import Candidates, TargetPartial
from memlm.index.metrics import METRICS, check_choice
from memlm.memory.growing import Growing
from memlm.memory.knn import check_temperature
from memlm.memory.pairs import check_observed, pair_candidates
from memlm.memory.windows import Window, score_bank
from memlm.ops.bank import Places, Visibility, earlier_in_stream
from memlm.ops.tokens import target_partial


class LocalState(Growing):
    """What every row has seen."""

    @property
    def tokens(self) -> Tensor:
        """``(rows, length)`` int64."""
        return self.columns[0]

    @property
    def keys(self) -> Tensor:
        """``(rows, length, dim)`` hidden states at those tokens; dim is 0 before the first."""
        return self.columns[1]

    @property
    def valid(self) -> Tensor:
        """``(rows, length)`` bool, False on padding."""
        return self.columns[2]


@dataclass(frozen=True)
class LocalMemory(Config):
    """The sequence's own past as candidates.

    Attributes:
        size: how many past pairs are candidates.
        temperature: what scores are divided by.
        metric: "ip" (both papers), "l2" or "cosine".
    """

    size: int = 512
    temperature: float = 1.0
    metric: str = "ip"

    def __post_init__(self):
        check(self.size >= 1, f"size must be at least 1, got {self.size}")
        check_temperature(self.temperature)
        check_choice("metric", self.metric, METRICS)

    def init_state(self, rows: int) -> LocalState:
        """Nothing seen yet."""
        check(rows >= 1, f"rows must be at least 1, got {rows}")
        return LocalState(
            torch.empty(rows, 0, dtype=torch.int64),
            torch.empty(rows, 0, 0),
            torch.empty(rows, 0, dtype=torch.bool),
        )

    def observe(
        self, tokens: Tensor, keys: Tensor, state: LocalState, valid: Tensor | None = None
    ) -> LocalState:
        """Append what came.

        Args:
            tokens: ``(rows, time)`` int64.
            keys: ``(rows, time, dim)`` hidden states at them.
            state: so far.
            valid: ``(rows, time)`` bool, False on padding; None: all real.

        Raises:
            InputError: if shapes do not fit each other or the state.
        """
        rows, length = state.tokens.shape
        check_observed(tokens, keys, rows, state.keys.shape[-1] if length else None)
        if valid is None:
            valid = torch.ones_like(tokens, dtype=torch.bool)
        keys = keys.detach()
        if length == 0:
            return LocalState(tokens, keys, valid)
        return state.append(tokens, keys, valid)

    @torch.no_grad()
    def read(self, query: Tensor, state: LocalState) -> tuple[Candidates, LocalState]:
        """The last ``size`` pairs of every row.

        Args:
            query: ``(rows, dim)`` hidden states at the position observed last.
            state: with that position observed.

        Returns:
            Candidates ``(rows, at most size)``, oldest first; ids are positions of the keys. One
            column that is not valid if there is no pair yet.

        Raises:
            InputError: if the query does not fit the state.
        """
        first = max(0, state.length - 1 - self.size)
        candidates = pair_candidates(
            query,
            state.keys[:, first:-1],
            state.tokens[:, first + 1 :],
            state.valid[:, first:-1] & state.valid[:, first + 1 :],
            metric=self.metric,
            temperature=self.temperature,
            first=first,
        )
        return candidates, state

    def score(
        self, query: Tensor, targets: Tensor, state: LocalState
    ) -> tuple[TargetPartial, LocalState]:
        """The past's mass, and the part of it on known next tokens; see `TokenMemory`."""
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def select_rows(self, state: LocalState, index: Tensor) -> LocalState:
        """The state of the rows ``index``, copied or dropped."""
        return state.select(index.to(state.tokens.device))

    def crop(self, state: LocalState, length: int) -> LocalState:
        """The state after only the first ``length`` tokens.

        Raises:
            InputError: if fewer were observed.
        """
        seen = state.tokens.shape[1]
        check(0 <= length <= seen, f"length must lie between 0 and {seen}, got {length}")
        return state.crop(length)

    def finish(self, state: LocalState) -> LocalState:
        """The state at the beginning of the next window: nothing seen yet."""
        return self.init_state(len(state.tokens))

    @property
    def reads_leave_state(self) -> bool:
        """Positions that nobody asks about need not be read."""
        return True

    @property
    def windowed(self) -> bool:
        """Whether whole windows can be scored at once: for dot products."""
        return self.metric == "ip"

    @torch.no_grad()
    def score_window(self, window: Window, state: LocalState) -> tuple[TargetPartial, LocalState]:
        """What the earlier positions of each window say about its scored tokens.

        Args:
            window: the positions.
            state: given back as it is; windows share nothing.

        Returns:
            ``(scored,)`` partial, and the state.
        """
        rows, width = window.tokens.shape
        place = torch.arange(width, device=window.tokens.device).expand(rows, width)
        zeros = torch.zeros_like(place)
        asked = slice(window.first, width)
        partial = score_bank(
            window,
            window.keys,
            window.tokens,
            window.real,
            Places(zeros, zeros, place),
            Places(zeros[:, asked], zeros[:, asked], place[:, asked]),
            self._within_size,
            self.temperature,
        )
        return partial, state

    @property
    def _within_size(self) -> Visibility:
        def rule(query: Places, key: Places) -> Tensor:
            near = key.position[..., None, :] >= query.position[..., :, None] - self.size
            return earlier_in_stream(query, key) & near

        return rule

    def stats(self, state: LocalState) -> dict[str, Any]:
        """Candidates of the next read."""
        entries = min(self.size, max(0, state.tokens.shape[1] - 1))
        return {"entries": entries, "searches_per_position": 0, "off": entries == 0}

    def describe(self) -> dict[str, Any]:
        """The settings."""
        return {
            "memory": "local",
            "size": self.size,
            "temperature": self.temperature,
            "metric": self.metric,
        }
