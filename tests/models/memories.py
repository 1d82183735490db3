"""Two hand-made memories: one answers each query on its own, one remembers what it saw."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.types import Candidates
from memlm.ops.tokens import target_partial
from memlm.testing.tiny import VOCABULARY


class Fixed:
    """No state: the candidates are a fixed random function of the query.

    Args:
        share: of the queries that have any candidate at all.
    """

    def __init__(self, dim: int = 16, k: int = 5, seed: int = 0, share: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.randn(dim, VOCABULARY, generator=generator)
        self.k, self.share, self.queries = k, share, 0

    def init_state(self, rows: int) -> None:
        return None

    def read(self, query: Tensor, state: None) -> tuple[Candidates, None]:
        assert query.ndim == 2
        assert not query.requires_grad
        self.queries += len(query)
        query = query.float().cpu()
        scores, tokens = (query @ self.directions).topk(self.k)
        tokens = tokens % 7 + 3  # few tokens: several candidates propose the same one
        chosen = torch.sigmoid(query[:, :1]) < self.share
        return Candidates(scores, tokens, tokens, chosen.expand_as(tokens)), None

    def score(self, query: Tensor, targets: Tensor, state: None):
        return target_partial(self.read(query, state)[0], targets), None

    def observe(self, tokens: Tensor, keys: Tensor, state: None) -> None:
        raise AssertionError("a memory without state has nothing to observe")

    def select_rows(self, state: None, index: Tensor) -> None:
        return None

    def crop(self, state: None, length: int) -> None:
        return None

    def stats(self, state: None) -> dict[str, Any]:
        return {"off": self.share == 0}

    def describe(self) -> dict[str, Any]:
        return {"memory": "fixed", "k": self.k}


class Past(NamedTuple):
    """What every row saw: real tokens in order, positions including padding, positions read."""

    seen: tuple[tuple[int, ...], ...]
    positions: int
    read: tuple[int, ...]
    asleep: tuple[bool, ...]


class Counter:
    """State: the tokens observed, per row. The prediction depends on every one of them.

    It also checks the order of the calls: every real position is observed once, then read once.
    """

    def init_state(self, rows: int) -> Past:
        return Past(((),) * rows, 0, (0,) * rows, (False,) * rows)

    def observe(
        self, tokens: Tensor, keys: Tensor, state: Past, valid: Tensor | None = None
    ) -> Past:
        rows, time = tokens.shape
        assert keys.shape[:2] == (rows, time)
        assert rows == len(state.seen)
        assert time == 1, "positions come one by one"
        assert all(len(seen) == read for seen, read in zip(state.seen, state.read, strict=True)), (
            "every position is read before the next is observed"
        )
        awake = [True] * rows if valid is None else valid[:, 0].tolist()
        seen = tuple(
            (*past, int(token)) if real else past
            for past, token, real in zip(state.seen, tokens[:, 0], awake, strict=True)
        )
        return Past(seen, state.positions + 1, state.read, tuple(not real for real in awake))

    def read(self, query: Tensor, state: Past) -> tuple[Candidates, Past]:
        assert len(query) == len(state.seen)
        tokens, read = [], []
        for row, seen in enumerate(state.seen):
            if state.asleep[row]:  # must leave the row alone; what it says is not used
                tokens.append([0, 0])
                read.append(state.read[row])
                continue
            assert len(seen) == state.read[row] + 1, "observe comes before read"
            code = 0
            for token in seen:
                code = (code * 31 + token) % 1_000_003
            tokens.append([code % 58 + 3, code % 13 + 3])
            read.append(state.read[row] + 1)
        proposed = torch.tensor(tokens)
        scores = torch.tensor([[14.0, 13.5]]).expand(len(tokens), 2)
        valid = torch.ones_like(proposed, dtype=torch.bool)
        return Candidates(scores, proposed, proposed, valid), state._replace(read=tuple(read))

    def score(self, query: Tensor, targets: Tensor, state: Past):
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def select_rows(self, state: Past, index: Tensor) -> Past:
        rows = index.tolist()
        return Past(
            tuple(state.seen[row] for row in rows),
            state.positions,
            tuple(state.read[row] for row in rows),
            tuple(state.asleep[row] for row in rows),
        )

    def crop(self, state: Past, length: int) -> Past:
        assert 0 <= length <= state.positions
        gone = state.positions - length
        return Past(
            tuple(seen[: len(seen) - gone] for seen in state.seen),
            length,
            tuple(read - gone for read in state.read),
            (False,) * len(state.seen),
        )

    def stats(self, state: Past) -> dict[str, Any]:
        return {"seen": [len(seen) for seen in state.seen]}

    def describe(self) -> dict[str, Any]:
        return {"memory": "counter"}
