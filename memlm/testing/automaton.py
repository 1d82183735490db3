"""RetoMaton one entry at a time: the readable reference of ``memory.automaton``.

One sequence, plain lists, a loop over entries wherever there are entries, as the paper's section 3
reads and as the published code runs:

    current = []                                   kept entries, best first
    read(q):    P = successors of current
                search if fewer than min_knns
                X = P, then members of P's clusters, clusters with most pointers first
                X = X[:max_knns]                   (distinct: each entry once, before the cut)
                E = found + X                      (distinct: each entry once)
                score of e = -|q - key_e|^2
    observe(y): current = those of E whose value is y and that have a successor, best first
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class PlainAutomaton:
    """The automaton of one sequence.

    Attributes:
        keys: ``(entries, dim)``.
        values: token after each key.
        successors: entry after each entry, -1 for none.
        k: neighbours of a search.
        min_knns: search when fewer pointers are alive.
        max_knns: entries that pointers and clusters contribute, at most.
        temperature: what scores are divided by.
        cluster_of: cluster of each entry, -1 for none; None without clusters.
        distinct: each entry counts once.
        bonus: added to the scaled score of entries that a pointer leads to.
        search: ``search(query, k)`` gives entries, nearest first; None: all keys are compared.
        current: kept entries, best first.
        retrieved: what the last read retrieved, with scores before the temperature.
        searched: whether the last read searched.
        steps: reads so far.
        runs: at each search, the number of reads without one since the search before.
        run: reads since the last search.
    """

    keys: NDArray
    values: Sequence[int]
    successors: Sequence[int]
    k: int = 1024
    min_knns: int = 1
    max_knns: int = 1024
    temperature: float = 1.0
    cluster_of: Sequence[int] | None = None
    distinct: bool = True
    bonus: float = 0.0
    search: Callable[[NDArray, int], Sequence[int]] | None = None
    current: list[int] = field(default_factory=list)
    retrieved: list[tuple[int, float]] = field(default_factory=list)
    searched: bool = False
    steps: int = 0
    runs: list[int] = field(default_factory=list)
    run: int = 0
    _members: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self):
        for entry, cluster in enumerate(self.cluster_of or ()):
            self._members.setdefault(cluster, []).append(entry)

    def read(self, query: NDArray) -> list[tuple[int, float, int]]:
        """Candidates for the next token: (entry, score over temperature, token)."""
        pointers = [self.successors[entry] for entry in self.current]
        if self.distinct:
            pointers = list(dict.fromkeys(pointers))
        self.searched = len(pointers) < self.min_knns
        self.steps += 1
        if self.searched:
            self.runs.append(self.run)
            self.run = 0
        else:
            self.run += 1
        reached = self.extended(pointers)
        found = list((self.search or self._search)(query, self.k)) if self.searched else []
        entries = found + reached
        if self.distinct:
            entries = list(dict.fromkeys(entries))
        self.retrieved = [(entry, self.similarity(query, entry)) for entry in entries]
        on_pointer = set(pointers)
        return [
            (
                entry,
                score / self.temperature + (self.bonus if entry in on_pointer else 0.0),
                self.values[entry],
            )
            for entry, score in self.retrieved
        ]

    def observe(self, token: int) -> None:
        """What came: keep those that proposed it and go on somewhere."""
        kept = [
            (entry, score)
            for entry, score in self.retrieved
            if self.values[entry] == token and self.successors[entry] >= 0
        ]
        self.current = [entry for entry, _ in sorted(kept, key=lambda pair: -pair[1])]

    def extended(self, pointers: list[int]) -> list[int]:
        """Pointers and the members of their clusters, cut to ``max_knns``."""
        if len(pointers) >= self.max_knns or self.cluster_of is None:
            return pointers[: self.max_knns]
        hits = Counter(self.cluster_of[entry] for entry in pointers)
        hits.pop(-1, None)
        reached = list(pointers)
        for cluster in sorted(hits, key=lambda cluster: (-hits[cluster], cluster)):
            reached += self._members[cluster]
        if self.distinct:
            reached = list(dict.fromkeys(reached))
        return reached[: self.max_knns]

    def similarity(self, query: NDArray, entry: int) -> float:
        """Minus the squared distance."""
        difference = query - self.keys[entry]
        return -float(difference @ difference)

    def _search(self, query: NDArray, k: int) -> list[int]:
        scores = [self.similarity(query, entry) for entry in range(len(self.keys))]
        return sorted(range(len(self.keys)), key=lambda entry: (-scores[entry], entry))[:k]

    @property
    def foss_legacy(self) -> float:
        """The fraction of saved searches as the published code counts it."""
        return sum(self.runs) / (sum(self.runs) + len(self.runs))

    @property
    def saved(self) -> float:
        """The fraction of saved searches."""
        return 1 - len(self.runs) / self.steps


def log_probability(candidates: list[tuple[int, float, int]], token: int) -> float:
    """``log p(token)`` among candidates, -inf where none proposes it."""
    scores = np.array([score for _, score, _ in candidates], dtype=np.float64)
    mine = np.array([proposed == token for _, _, proposed in candidates], dtype=bool)
    if not mine.any():
        return -np.inf
    return float(np.logaddexp.reduce(scores[mine]) - np.logaddexp.reduce(scores))
