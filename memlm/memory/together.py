"""Several memories as one: the union of their candidates.

    candidates = those of all members            lse = logsumexp over the members' lse

With weights, each member's candidates are normalised first, and the memory says

    sum_i lam_i p_i(token)

which the merge `Shares` puts beside ``1 - sum_i lam_i`` of the model: several datastores in one
model, each with a weight of its own. Their order does not matter; a member that has no candidate
gives its weight back to the model, as if it were not there.

Union is associative, so under the merge `Union` the members and the model's vocabulary share one
softmax: TRIME's local, long-term and external memory (Zhong et al. 2022, eq. 4). Each member
divides by its own temperature and keeps its own state; the state of all is a tuple.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import Candidates, TargetPartial, TokenMemory
from memlm.memory.windows import Window, is_windowed
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.merge import union


class Together:
    """The union of several memories.

    Args:
        members: at least one.
        lams: weight of each, from 0, together 1 at most; None: one softmax over all candidates.

    Attributes:
        members: as given.
        lams: as given.
        store: of the first member that has one (it says which model the keys are of).

    Raises:
        InputError: if there is none, or the weights are not one each and at most 1 together.
    """

    def __init__(self, *members: TokenMemory, lams: Sequence[float] | None = None):
        check(len(members) >= 1, "Together needs at least one memory, got none")
        self.members = members
        self.lams = None if lams is None else tuple(float(lam) for lam in lams)
        if self.lams is not None:
            check(
                len(self.lams) == len(members)
                and min(self.lams) >= 0
                and sum(self.lams) <= 1 + 1e-9,
                f"lams must be {len(members)} weights from 0, one for each memory, of sum 1 at "
                f"most, got {self.lams}",
            )
        stores = [member.store for member in members if hasattr(member, "store")]  # type: ignore[attr-defined]
        if stores:
            self.store: Any = stores[0]

    def init_state(self, rows: int) -> tuple[Any, ...] | None:
        """The members' states; None if no member has one."""
        states = tuple(member.init_state(rows) for member in self.members)
        return None if all(state is None for state in states) else states

    def read(self, query: Tensor, state: Any) -> tuple[Candidates, Any]:
        """The candidates of all members, beside each other; ids are the members' own.

        Args:
            query: ``(rows, dim)``.
            state: of all, or None.
        """
        parts, state = self.read_each(query, state)
        joined = Candidates(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
        return joined, state

    def read_each(self, query: Tensor, state: Any) -> tuple[list[Candidates], Any]:
        """As `read`, each member's candidates for themselves."""
        answers = [member.read(query, own) for member, own in self._each(state)]
        parts = [candidates for candidates, _ in answers]
        if self.lams is not None:
            parts = [_weighted(*pair) for pair in zip(parts, self.lams, strict=True)]
        return parts, self._state([own for _, own in answers], state)

    def score(self, query: Tensor, targets: Tensor, state: Any) -> tuple[TargetPartial, Any]:
        """The mass of all members, and the part of it on known next tokens.

        Args:
            query: ``(rows, dim)``.
            targets: ``(rows,)`` int64.
            state: of all, or None.
        """
        answers = [member.score(query, targets, own) for member, own in self._each(state)]
        return self._union([partial for partial, _ in answers]), self._state(
            [own for _, own in answers], state
        )

    def observe(self, tokens: Tensor, keys: Tensor, state: Any, valid: Tensor | None = None) -> Any:
        """Tell every member that has a state; arguments as of `TokenMemory`."""
        mask = {} if valid is None else {"valid": valid}
        return self._state(
            [
                None if own is None else member.observe(tokens, keys, own, **mask)
                for member, own in self._each(state)
            ],
            state,
        )

    def select_rows(self, state: Any, index: Tensor) -> Any:
        """The state of the rows ``index``."""
        return self._state(
            [
                None if own is None else member.select_rows(own, index)
                for member, own in self._each(state)
            ],
            state,
        )

    def crop(self, state: Any, length: int) -> Any:
        """The state after only the first ``length`` positions."""
        return self._state(
            [
                None if own is None else member.crop(own, length)
                for member, own in self._each(state)
            ],
            state,
        )

    def finish(self, state: Any) -> Any:
        """The state at the beginning of the next window: see `LongMemory.finish`."""
        return self._state(
            [
                member.finish(own) if hasattr(member, "finish") else own  # type: ignore[attr-defined]
                for member, own in self._each(state)
            ],
            state,
        )

    @property
    def reads_leave_state(self) -> bool:
        """Whether a read changes no member's state."""
        return all(
            getattr(member, "reads_leave_state", False) or member.init_state(1) is None
            for member in self.members
        )

    @property
    def windowed(self) -> bool:
        """Whether whole windows can be scored at once: every member can, or has no state."""
        return all(is_windowed(member) or member.init_state(1) is None for member in self.members)

    @property
    def spans_windows(self) -> bool:
        """Whether a member's state goes on from window to window."""
        return any(getattr(member, "spans_windows", False) for member in self.members)

    def score_window(self, window: Window, state: Any) -> tuple[TargetPartial, Any]:
        """What all members say about the scored tokens of windows.

        Args:
            window: the positions.
            state: of all, or None.

        Returns:
            ``(scored,)`` partial, and the state after these windows.
        """
        partials, states = [], []
        for member, own in self._each(state):
            if is_windowed(member):
                partial, own = member.score_window(window, own)  # type: ignore[attr-defined]
            else:
                partial, own = member.score(window.keys[window.scored], window.targets, own)
            partials.append(partial)
            states.append(own)
        return self._union(partials), self._state(states, state)

    def stats(self, state: Any) -> dict[str, Any]:
        """The members' figures; candidates and searches summed."""
        each = [member.stats(own) for member, own in self._each(state)]
        return {
            "entries": sum(stats.get("entries", 0) for stats in each),
            "searches_per_position": sum(stats.get("searches_per_position", 0) for stats in each),
            "off": all(stats.get("off", False) for stats in each),
            "members": each,
        }

    def describe(self) -> dict[str, Any]:
        """The members' descriptions."""
        described: dict[str, Any] = {"memory": "together"}
        if self.lams is not None:
            described["lams"] = list(self.lams)
        return described | {"members": [member.describe() for member in self.members]}

    def _each(self, state: Any) -> list[tuple[TokenMemory, Any]]:
        states = (None,) * len(self.members) if state is None else state
        return list(zip(self.members, states, strict=True))

    def _state(self, states: list[Any], before: Any) -> Any:
        return None if before is None else tuple(states)

    def _union(self, partials: list[TargetPartial]) -> TargetPartial:
        dtype = max((part.lse.dtype for part in partials), key=lambda dtype: dtype.itemsize)
        parts = [TargetPartial(*(half.to(dtype) for half in part)) for part in partials]
        if self.lams is not None:
            parts = [_weighted_partial(*pair) for pair in zip(parts, self.lams, strict=True)]
        return union(*parts)


def _weighted(candidates: Candidates, lam: float) -> Candidates:
    """The candidates with scores ``log(lam p)``; none where the weight is zero."""
    if lam == 0:
        return candidates._replace(valid=torch.zeros_like(candidates.valid))
    scores = candidates.scores.masked_fill(~candidates.valid, -torch.inf)
    claimed = safe_logsumexp(scores).unsqueeze(-1)
    claimed = claimed.masked_fill(torch.isneginf(claimed), 0)
    return candidates._replace(scores=scores - claimed + math.log(lam))


def _weighted_partial(partial: TargetPartial, lam: float) -> TargetPartial:
    """``log lam`` and ``log(lam p(target))``; -inf for both where there is no candidate."""
    empty = torch.isneginf(partial.lse) | (lam == 0)
    logarithm = math.log(lam) if lam else 0.0
    share = partial.target_lse - partial.lse.masked_fill(empty, 0) + logarithm
    return TargetPartial(
        lse=torch.full_like(partial.lse, logarithm).masked_fill(empty, -torch.inf),
        target_lse=share.masked_fill(empty, -torch.inf),
    )
