"""Two small memories to evaluate with: one over fixed keys, one that remembers its own window."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.types import Candidates
from memlm.ops.tokens import target_partial
from memlm.testing.tiny import VOCABULARY


class FixedMemory:
    """kNN over random keys; silent for queries whose first entry is above ``silent_above``."""

    def __init__(self, dim=16, entries=12, *, k=5, temperature=2.0, seed=0, silent_above=None):
        generator = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(entries, dim, generator=generator)
        self.values = torch.randint(0, VOCABULARY, (entries,), generator=generator)
        self.k, self.temperature, self.silent_above = k, temperature, silent_above
        self.largest_query = 0

    def init_state(self, rows: int) -> None:
        return None

    def read(self, query: Tensor, state: Any) -> tuple[Candidates, Any]:
        self.largest_query = max(self.largest_query, len(query))
        distance = torch.cdist(query, self.keys, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        distance, ids = distance.topk(self.k, largest=False)
        valid = torch.ones_like(ids, dtype=torch.bool)
        if self.silent_above is not None:
            valid &= (query[:, 0] <= self.silent_above)[:, None]
        return Candidates(-distance / self.temperature, self.values[ids], ids, valid), state

    def score(self, query, targets, state):
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def observe(self, tokens, keys, state):
        return state

    def select_rows(self, state, index):
        return state

    def crop(self, state, length):
        return state

    def stats(self, state):
        return {}

    def describe(self):
        index = {"engine": "exact", "metric": "l2"}
        return {"memory": "fixed", "k": self.k, "temperature": self.temperature, "index": index}


class Past(NamedTuple):
    keys: Tensor
    tokens: Tensor


class PastMemory:
    """The window's own past: every earlier position proposes the token that followed it."""

    def __init__(self, temperature=2.0):
        self.temperature = temperature
        self.shown: list[int] = []

    def init_state(self, rows: int) -> Past:
        return Past(torch.zeros(rows, 0, 16), torch.zeros(rows, 0, dtype=torch.int64))

    def read(self, query: Tensor, state: Past) -> tuple[Candidates, Past]:
        # The newest key is the query itself: nothing followed it yet.
        keys, tokens = state.keys[:, :-1], state.tokens[:, 1:]
        scores = (query[:, None] * keys).sum(-1) / self.temperature
        ids = torch.arange(scores.shape[1]).expand_as(scores)
        valid = torch.ones_like(ids, dtype=torch.bool)
        return Candidates(scores, tokens, ids, valid), state

    def score(self, query, targets, state):
        candidates, state = self.read(query, state)
        if candidates.scores.shape[1] == 0:
            empty = torch.full(targets.shape, -torch.inf)
            return target_partial(candidates, targets)._replace(lse=empty, target_lse=empty), state
        return target_partial(candidates, targets), state

    def observe(self, tokens: Tensor, keys: Tensor, state: Past) -> Past:
        self.shown.append(tokens.numel())
        return Past(torch.cat([state.keys, keys], 1), torch.cat([state.tokens, tokens], 1))

    def select_rows(self, state, index):
        return Past(state.keys[index], state.tokens[index])

    def crop(self, state, length):
        return Past(state.keys[:, :length], state.tokens[:, :length])

    def stats(self, state):
        return {}

    def describe(self):
        return {"memory": "past", "temperature": self.temperature}
