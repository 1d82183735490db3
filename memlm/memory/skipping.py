"""Searching only now and then, at random: the baseline for saved searches.

RetoMaton (Alon et al. 2022, section 5) compares itself with a kNN-LM that is given the same number
of searches but no idea where to spend them: at a share f of the positions it does not search, and
the model stands alone there ("kNN-LM at FoSS f").

Which positions these are is decided by the text itself, through a random polynomial of the tokens
so far,

    h_t = (a h_{t-1} + token_t + 1) mod P        skip position t  iff  (b h_t mod P) / P < share

with P = 2^31 - 1 and a, b, h_0 drawn from the seed. So the same text gives the same positions,
whatever else is in the batch, and nothing but h is remembered.
"""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import Candidates, TargetPartial, TokenMemory
from memlm.ops.tokens import target_partial

_PRIME = 2**31 - 1


class SkippingState(NamedTuple):
    """Where each sequence stands.

    Attributes:
        past: ``(rows, kept, 3)`` int64, after each of the last positions: the polynomial, steps
            and searches; the last one is now.
        asleep: ``(rows,)`` bool, rows whose last position was padding; None: none.
        length: positions observed, padding included.
    """

    past: Tensor
    asleep: Tensor | None
    length: int


class SkippingMemory:
    """A memory that is asked at a random share of the positions, and silent at the others.

    Args:
        inner: without state, e.g. a `KnnMemory`.
        share: of the positions where nothing is asked, 0 to 1.
        seed: of the choice.
        history: positions that `crop` can take back.

    Raises:
        InputError: for settings out of range, or a memory that has a state of its own.
    """

    def __init__(self, inner: TokenMemory, *, share: float = 0.5, seed: int = 1, history: int = 32):
        check(0 <= share <= 1, f"share must lie between 0 and 1, got {share}")
        check(history >= 0, f"history must be at least 0, got {history}")
        check(
            inner.init_state(1) is None,
            f"only a memory without state can be asked now and then, but {type(inner).__name__} "
            "has one; use a kNN memory",
        )
        self.inner, self.share, self.seed, self.history = inner, share, seed, history
        draw = random.Random(seed)
        self._start, self._step, self._spread = (draw.randrange(1, _PRIME) for _ in range(3))

    @property
    def store(self) -> Any:
        """The datastore of the memory inside, None if it has none."""
        return getattr(self.inner, "store", None)

    def init_state(self, rows: int) -> SkippingState:
        """Nothing read yet."""
        check(rows >= 1, f"rows must be at least 1, got {rows}")
        now = torch.tensor([self._start, 0, 0])
        return SkippingState(now.repeat(rows, 1, 1), None, 0)

    def observe(
        self, tokens: Tensor, keys: Tensor, state: SkippingState, valid: Tensor | None = None
    ) -> SkippingState:
        """Let the tokens decide what is skipped.

        Args:
            tokens: ``(rows, time)`` int64.
            keys: not read.
            state: so far.
            valid: ``(rows, time)`` bool, False on padding; None: all real.

        Raises:
            InputError: if the rows are not those of the state.
        """
        check(
            len(tokens) == len(state.past),
            f"tokens must have the {len(state.past)} rows of the state, got {len(tokens)}; make a "
            "new state for another batch",
        )
        past, tokens = state.past, tokens.to("cpu")
        asleep = None
        for time in range(tokens.shape[1]):
            now = past[:, -1].clone()
            now[:, 0] = (now[:, 0] * self._step + tokens[:, time] + 1) % _PRIME
            if valid is not None:
                asleep = ~valid[:, time].to("cpu")
                now = torch.where(asleep.unsqueeze(1), past[:, -1], now)
            past = torch.cat([past, now.unsqueeze(1)], dim=1)[:, -self.history - 1 :]
        return SkippingState(past, asleep, state.length + tokens.shape[1])

    @torch.no_grad()
    def read(self, query: Tensor, state: SkippingState) -> tuple[Candidates, SkippingState]:
        """What the memory inside says, for the rows that ask; nothing for the others.

        Args:
            query: ``(rows, dim)`` hidden states at the position observed last.
            state: with that position observed.

        Raises:
            InputError: if the rows are not those of the state.
        """
        rows = len(state.past)
        check(
            len(query) == rows,
            f"queries must have the {rows} rows of the state, got {len(query)}; read with the rows "
            "that were observed",
        )
        awake = torch.ones(rows, dtype=torch.bool) if state.asleep is None else ~state.asleep
        now = state.past[:, -1]
        asking = awake & (now[:, 0] * self._spread % _PRIME >= self.share * _PRIME)
        counts = torch.stack([torch.zeros_like(awake), awake, asking], dim=1).long()
        past = torch.cat([state.past[:, :-1], (now + counts).unsqueeze(1)], dim=1)
        return self._ask(query, asking.to(query.device)), state._replace(past=past)

    def _ask(self, query: Tensor, asking: Tensor) -> Candidates:
        found = None if not bool(asking.any()) else self.inner.read(query[asking], None)[0]
        width = 1 if found is None else found.scores.shape[1]
        nothing = torch.zeros(len(query), width, dtype=torch.int64, device=query.device)
        scores = torch.full_like(nothing, -torch.inf, dtype=torch.float32)
        silent = Candidates(scores, nothing, nothing - 1, nothing.bool())
        if found is None:
            return silent
        return Candidates(
            *(
                part.to(value.dtype).index_put((asking,), value.to(part.device))
                for part, value in zip(silent, found, strict=True)
            )
        )

    def score(
        self, query: Tensor, targets: Tensor, state: SkippingState
    ) -> tuple[TargetPartial, SkippingState]:
        """The mass, and the part of it on known next tokens; both -inf where nothing was asked.

        Args:
            query: ``(rows, dim)``, as for ``read``.
            targets: ``(rows,)`` int64.
            state: as for ``read``.
        """
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def select_rows(self, state: SkippingState, index: Tensor) -> SkippingState:
        """The state of the rows ``index``, copied or dropped."""
        index = index.to("cpu")
        asleep = None if state.asleep is None else state.asleep[index]
        return SkippingState(state.past[index], asleep, state.length)

    def crop(self, state: SkippingState, length: int) -> SkippingState:
        """The state after only the first ``length`` positions.

        Raises:
            InputError: if fewer were observed, or more would be taken back than ``history`` holds.
        """
        seen, back = state.length, state.length - length
        check(0 <= length <= seen, f"length must lie between 0 and {seen}, got {length}")
        if length == 0:
            return self.init_state(len(state.past))
        check(
            back < state.past.shape[1],
            f"at most {state.past.shape[1] - 1} positions can be taken back, got {back}; make the "
            f"memory with history={back} or more",
        )
        return SkippingState(state.past[:, : state.past.shape[1] - back], None, length)

    def stats(self, state: SkippingState) -> dict[str, Any]:
        """Steps, searches and the fraction of saved searches of all rows together."""
        _, steps, searches = state.past[:, -1].sum(0).tolist()
        saved = 1 - searches / steps if steps else 0.0
        return {
            **self.inner.stats(None),
            "steps": steps,
            "searches": searches,
            "saved": saved,
            "searches_per_position": 1 - saved,
            "off": False,
        }

    def describe(self) -> dict[str, Any]:
        """The memory inside, and how often it is not asked."""
        inner = self.inner.describe()
        return {
            **inner,
            "memory": f"{inner.get('memory', 'memory')} skipping",
            "share": self.share,
            "seed": self.seed,
        }
