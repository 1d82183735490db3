"""RetoMaton: a datastore walked as an automaton, searched only when the walk ends.

Alon et al. 2022. Every entry of a store points to the entry that was made at the next position of
the text. After a step, the entries E that were retrieved and *agree* with the token y that came are
kept, and their successors are where the next step continues (eq. 4, section 3.2):

    pointers = { successor(e) : e in E, value_e = y }              the automaton's live states
    states   = pointers and, with clusters, all members of their clusters           (section 3.3)
    E'       = states                         if at least min_knns pointers are alive, else
               k nearest of a search, and states

    p(y | q) ~ sum over e in E' with value_e = y of exp(score(q, e) / temperature)

So a long match with the store is followed for the price of a few distances, and each skipped search
is a search saved. `min_knns=1` searches only when no pointer is left; a number no step can reach
searches always and still follows pointers ("FoSS 0", the best perplexity in the paper).

A row of the batch is a sequence with a state of its own:

    observe(token)   keep what agreed, step to the successors
    read(query)      extend by clusters, search the rows that must, score, remember what was found

All of it is vectorised over rows (see `memory.pointers`); rows that must search share one call of
the index. The fraction of saved searches is 1 - searches / steps.

Differs from the papers' code: each entry counts once, however many ways lead to it (the original
lets the copies of a match pile up; ``multiplicity="legacy"``); pointers end where a document ends
(``successors="all"`` crosses); state is per sequence, not per forward call; found and followed
entries are scored on one scale, exactly (``scores="index"``: both as the index holds them, which is
what published numbers used); generation follows pointers too, the token that was emitted being the
one that came.
"""

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import Candidates, Index, SearchResult, TargetPartial
from memlm.index.exclude import search_without
from memlm.index.keys import load_if_it_fits
from memlm.index.metrics import check_choice
from memlm.index.partition import Clusters
from memlm.memory.automaton_config import (
    GIVEN,
    AutomatonConfig,
    find_clusters,
    find_index,
    find_successors,
    joins,
    name_of_clusters,
    name_of_index,
)
from memlm.memory.automaton_state import (
    AutomatonState,
    new_state,
    retrieved,
    selected,
    stepped,
    taken_back,
)
from memlm.memory.knn import KnnMemory, Store, store_state, weighted
from memlm.memory.pairs import check_observed, check_query
from memlm.memory.pointers import (
    cluster_table,
    compact,
    contains,
    first_copies,
    follow,
    members,
    pair_scores,
    table,
)
from memlm.ops.tokens import target_partial

# Numbers (keys x dim) scored at a time: on the CPU they stay in the processor's cache, and an
# allocation is small enough not to be given fresh pages every time.
_CHUNK_NUMBERS = 1 << 17
_CHUNK_NUMBERS_GPU = 1 << 27


class AutomatonMemory:
    """A store walked by pointers.

    Args:
        store: a `Datastore`, or anything that offers what `memory.knn.Store` lists.
        k: neighbours of a search; more than the store holds is clamped with a warning.
        temperature: above 0, or "auto".
        min_knns: search when fewer pointers than this are alive; 0 never searches.
        max_knns: entries that pointers and clusters contribute to a step, at most.
        clusters: `Clusters` of this store; "auto": those saved in the store's directory, if any;
            None: every entry is a state of its own.
        multiplicity: "set", "legacy" or a log-weight (see `AutomatonConfig`).
        successors: "documents", "all", or ``(entries,)`` integers, -1 for none.
        scores: "exact" or "index" (see `AutomatonConfig`).
        index: over the store's keys, "auto" or "exact".
        history: positions that `crop` can take back (assisted decoding: its draft's length).
        device: where keys and pointers are. Keys are held there if they need less than half of the
            machine's memory, else the few that are wanted are read from the store at every step.

    Attributes:
        config: the settings as given.
        k: neighbours in force.
        temperature: the number in force.
        clusters: in force, or None.

    Raises:
        InputError: for settings out of range, an empty store, or parts of another size.
        FingerprintError: for an index or clusters of another store.
    """

    def __init__(
        self,
        store: Store,
        *,
        k: int = 1024,
        temperature: float | str = 1.0,
        min_knns: int = 1,
        max_knns: int = 1024,
        clusters: Clusters | str | None = "auto",
        multiplicity: str | float = "set",
        successors: Tensor | str = "documents",
        scores: str = "exact",
        index: Index | str = "auto",
        history: int = 32,
        device: str | torch.device = "cpu",
    ):
        self.config = AutomatonConfig(
            k=k,
            temperature=temperature,
            min_knns=min_knns,
            max_knns=max_knns,
            clusters=name_of_clusters(store, clusters),
            multiplicity=multiplicity,
            successors=successors if isinstance(successors, str) else GIVEN,
            scores=scores,
            index=name_of_index(index),
            history=history,
        )
        check(len(store) > 0, "the datastore must hold entries, got an empty one; extract it again")
        if k > len(store):
            warnings.warn(
                f"k must be at most the store's {len(store)} entries, got {k}; using {len(store)}",
                UserWarning,
                stacklevel=2,
            )
        self.device = torch.device(device)
        keys = load_if_it_fits(store)
        keys = keys.to(self.device) if isinstance(keys, Tensor) else keys
        searched = KnnMemory(
            store,
            k=min(k, len(store)),
            temperature=temperature,
            index=find_index(store, keys, index),
        )
        self.store, self.index = store, searched.index
        self.k, self.temperature = searched.k, searched.temperature
        self.clusters = find_clusters(store, clusters)
        self._keys = keys
        values = torch.as_tensor(store.values).reshape(-1)
        following = find_successors(store, successors)
        self._values = table(values, self.device)
        self._successors = table(following, self.device)
        # What must come for the walk to go on at an entry: no token is -1.
        self._agreeing = table(values.masked_fill(following < 0, -1), self.device)
        self._exclusion, self._weights = searched.exclusion, searched.weights
        self._clusters = (
            None
            if self.clusters is None
            else cluster_table(self.clusters.without(getattr(store, "dead", None)), self.device)
        )
        self._joins = joins(store, following, self.config.successors)

    @classmethod
    def from_config(
        cls,
        store: Store,
        config: AutomatonConfig,
        *,
        clusters: Clusters | None = None,
        successors: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> "AutomatonMemory":
        """The memory with the settings ``config``.

        Args:
            store: the datastore.
            config: the settings.
            clusters: where the config says "given".
            successors: where the config says "given".
            device: where keys and pointers are.

        Raises:
            InputError: if something that was given by hand is missing.
        """
        values: dict[str, Any] = {part.name: getattr(config, part.name) for part in fields(config)}
        for name, value in (("clusters", clusters), ("successors", successors)):
            if values[name] == GIVEN:
                check(
                    value is not None,
                    f"these settings belong to {name} that were given by hand; pass {name}",
                )
                values[name] = value
        return cls(store, **values, device=device)

    def changed(self, k: int, temperature: float, **settings: Any) -> "AutomatonMemory":
        """The same store, index and states with other settings; nothing is loaded again.

        Args:
            k: neighbours of a search; more than the store holds is clamped.
            temperature: above 0.
            settings: others of ``min_knns``, ``max_knns``, ``multiplicity`` and ``history``.

        Raises:
            InputError: for other names or values out of range.
        """
        names = ("min_knns", "max_knns", "multiplicity", "history")
        for name in settings:
            check_choice("a setting to change", name, names)
        twin = copy(self)
        twin.config = replace(self.config, k=k, temperature=temperature, **settings)
        twin.k, twin.temperature = min(k, len(self)), temperature
        return twin

    def __len__(self) -> int:
        return len(self.store)

    @property
    def _distinct(self) -> bool:
        return self.config.multiplicity != "legacy"

    def init_state(self, rows: int) -> AutomatonState:
        """No pointer is alive yet: the first read searches."""
        return new_state(rows, self.device)

    @torch.no_grad()
    def observe(
        self, tokens: Tensor, keys: Tensor, state: AutomatonState, valid: Tensor | None = None
    ) -> AutomatonState:
        """Keep the entries that agreed with what came, and step to their successors.

        Args:
            tokens: ``(rows, time)`` int64. Of several positions, all but the last are read in
                passing, so that pieces of any length lead to the same state.
            keys: ``(rows, time, dim)`` hidden states at them.
            state: so far.
            valid: ``(rows, time)`` bool, False on padding; None: all real.

        Raises:
            InputError: if the rows are not those of the state.
        """
        check_observed(tokens, keys, len(state.entries))
        for time in range(tokens.shape[1]):
            if time:
                state = self.read(keys[:, time - 1], state)[1]
            awake = None if valid is None else valid[:, time].to(self.device)
            pointers = self._follow(tokens[:, time].to(self.device), awake, state)
            asleep = None if awake is None else ~awake
            state = stepped(state, pointers, asleep, self.config.history)
        return state

    def _follow(self, token: Tensor, awake: Tensor | None, state: AutomatonState) -> Tensor:
        """Successors of the retrieved entries that agree with the token, best first."""
        keep = self._agreeing[state.entries] == token.unsqueeze(1)
        if awake is not None:
            keep &= awake.unsqueeze(1)
        pointers = follow(state.entries, state.scores, keep, self._successors)
        if self._joins and self._distinct:
            (pointers,) = compact(first_copies(pointers), pointers, fill=(-1,))
        return pointers

    @torch.no_grad()
    def read(self, query: Tensor, state: AutomatonState) -> tuple[Candidates, AutomatonState]:
        """Where the pointers lead, and what a search finds for rows that have too few.

        Args:
            query: ``(rows, dim)`` hidden states at the position observed last.
            state: with that position observed.

        Returns:
            Candidates ``(rows, width)`` in no particular order, on the query's device.

        Raises:
            InputError: if the query does not fit the state, or is not finite.
        """
        check_query(query, len(state.entries), self.store.dim)
        place, query = query.device, query.detach().to(self.device)
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        searching = (state.pointers >= 0).sum(1) < self.config.min_knns
        if state.asleep is not None:
            searching &= ~state.asleep
        rows_to_search = searching.nonzero().squeeze(-1)
        followed, found = self._extend(state.pointers), None
        entries = followed
        if len(rows_to_search):
            found = self._search(query, rows_to_search)
            if self._distinct:
                followed = followed.masked_fill(contains(found.ids, followed), -1)
            entries = torch.cat([found.ids, followed], dim=1)
        if self.config.scores == "exact":
            scores = self._score(query, entries, self._gather)
        else:
            scores = self._score(query, followed, getattr(self.index, "reconstruct", self._gather))
            if found is not None:
                scores = torch.cat([found.scores, scores], dim=1)
        candidates = self._candidates(entries, scores, state)
        state = retrieved(state, entries, scores, None if found is None else searching)
        return Candidates(*(part.to(place) for part in candidates)), state

    def _search(self, query: Tensor, rows: Tensor) -> SearchResult:
        """What ``rows`` find, in one call; (-1, -inf) for the other rows."""
        found = search_without(self.index, query[rows], self.k, self._exclusion)
        shape = (len(query), self.k)
        ids = torch.full(shape, -1, dtype=torch.int64, device=self.device)
        scores = query.new_full(shape, -torch.inf)
        ids[rows], scores[rows] = found.ids.to(ids), found.scores.to(scores)
        return SearchResult(scores, ids)

    def _extend(self, pointers: Tensor) -> Tensor:
        """Pointers, then the members of their clusters: ``max_knns`` in all, at most."""
        most = self.config.max_knns
        pointers = pointers[:, :most]
        if self._clusters is None or pointers.shape[1] == 0:
            return pointers
        more = members(pointers, self._clusters, most)
        if self._distinct:
            more = more.masked_fill(contains(pointers, more), -1)
        followed = torch.cat([pointers, more], dim=1)
        if followed.shape[1] <= most:
            return followed
        return followed.masked_fill((followed >= 0).cumsum(1) > most, -1)

    def _score(self, query: Tensor, entries: Tensor, keys_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Similarity of every entry ``(rows, width)``, -inf where there is none."""
        scores, present = query.new_full(entries.shape, -torch.inf), entries >= 0
        ids = entries[present]
        if len(ids) == 0:
            return scores
        row = None if len(query) == 1 else present.nonzero(as_tuple=True)[0]
        numbers = _CHUNK_NUMBERS if self.device.type == "cpu" else _CHUNK_NUMBERS_GPU
        size = max(1, numbers // query.shape[1])
        parts = []
        for begin in range(0, len(ids), size):
            here = slice(begin, begin + size)
            mine = query if row is None else query.index_select(0, row[here])
            parts.append(pair_scores(mine, keys_of(ids[here]).to(query), self.index.metric))
        return scores.masked_scatter_(present, torch.cat(parts))

    def _gather(self, ids: Tensor) -> Tensor:
        keys = self._keys
        return keys.index_select(0, ids) if isinstance(keys, Tensor) else keys.gather(ids)

    def _candidates(self, entries: Tensor, scores: Tensor, state: AutomatonState) -> Candidates:
        if entries.shape[1] == 0:  # one empty column: not every reader takes a width of zero
            entries = entries.new_full((len(entries), 1), -1)
            scores = scores.new_full(entries.shape, -torch.inf)
        valid = entries >= 0
        if state.asleep is not None:
            valid &= ~state.asleep.unsqueeze(1)
        scores = weighted(scores / self.temperature, entries, self._weights)
        bonus = self.config.multiplicity
        if not isinstance(bonus, str) and bonus:
            scores = scores + bonus * contains(state.pointers, entries)
        return Candidates(scores, self._values[entries].long(), entries, valid)

    def score(
        self, query: Tensor, targets: Tensor, state: AutomatonState
    ) -> tuple[TargetPartial, AutomatonState]:
        """The memory's mass, and the part of it on known next tokens.

        The targets do not enter the state; the next ``observe`` tells it what came.

        Args:
            query: ``(rows, dim)``, as for ``read``.
            targets: ``(rows,)`` int64.
            state: as for ``read``.
        """
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    def select_rows(self, state: AutomatonState, index: Tensor) -> AutomatonState:
        """The state of the rows ``index``, copied or dropped."""
        return selected(state, index.to(self.device))

    def crop(self, state: AutomatonState, length: int) -> AutomatonState:
        """The state after only the first ``length`` positions.

        Raises:
            InputError: if fewer were observed, or more would be taken back than ``history`` holds.
        """
        return taken_back(state, length)

    def stats(self, state: AutomatonState) -> dict[str, Any]:
        """Figures of all rows together.

        ``saved`` is the fraction of saved searches, 1 - searches / steps. ``foss_legacy`` is what
        the published code prints instead: it forgets the steps after the last search of each
        sequence (None before the first search).
        """
        steps, searches, last = (int(counter.sum()) for counter in state.counters)
        saved = last - searches  # all other steps up to the last search
        return {
            "entries": len(self),
            "states": self.states,
            "out_degree": self.out_degree,
            "steps": steps,
            "searches": searches,
            "saved": 1 - searches / steps if steps else 0.0,
            "foss_legacy": saved / (saved + searches) if searches else None,
            "live_pointers": float((state.pointers >= 0).sum()) / len(state.pointers),
            "searches_per_position": searches / steps if steps else 1.0,
            "off": False,
        }

    @property
    def states(self) -> int:
        """States of the automaton: clusters, and entries that are in none."""
        return len(self) if self.clusters is None else self.clusters.states

    @cached_property
    def out_degree(self) -> float:
        """How many different states a state leads to, on average."""
        here = (self._successors >= 0).nonzero().squeeze(-1)
        there = self._successors[here].long()
        if self.clusters is None or self._clusters is None:
            return len(here) / len(self)
        none, cluster_of = len(self.clusters), self._clusters.cluster_of
        here, there = (
            torch.where(cluster_of[some] < none, cluster_of[some].long(), none + some)
            for some in (here, there)
        )
        return len((here * (none + len(self)) + there).unique()) / self.states

    def describe(self) -> dict[str, Any]:
        """Settings in force, the store's fingerprint, clusters, and the index with its recall."""
        successors = self.config.successors
        if successors == "documents" and getattr(self.store, "documents", None) is None:
            successors = "all"
        return {
            "memory": "automaton",
            "entries": len(self),
            "k": self.k,
            "temperature": self.temperature,
            "min_knns": self.config.min_knns,
            "max_knns": self.config.max_knns,
            "multiplicity": self.config.multiplicity,
            "successors": successors,
            "scores": self.config.scores,
            "keys": "in memory" if isinstance(self._keys, Tensor) else "on disk",
            "clusters": None if self.clusters is None else self.clusters.describe(),
            **store_state(self.store),
            "index": self.index.describe(),
        }
