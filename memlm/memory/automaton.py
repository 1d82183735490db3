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

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.types import Candidates, Index, TargetPartial
from memlm.index.build import has_index, load_index
from memlm.index.cluster import AUTOMATON_DIRECTORY, Clusters, has_clusters
from memlm.index.exact import ExactIndex
from memlm.index.keys import as_keys, load_if_it_fits
from memlm.index.metrics import check_choice, check_k
from memlm.memory.knn import INDEX_DIRECTORY, KnnMemory, Store, check_temperature
from memlm.memory.pointers import (
    check_successors,
    cluster_table,
    contains,
    first_copies,
    follow,
    members,
    next_entries,
)
from memlm.memory.scores import similarity
from memlm.ops.tokens import target_partial

GIVEN = "given"
_MULTIPLICITIES = ("set", "legacy")
_SUCCESSORS = ("documents", "all", GIVEN)
_SCORES = ("exact", "index")
# Numbers (keys x dim) scored at a time: they stay in the processor's cache.
_CHUNK_NUMBERS = 1 << 18


@dataclass(frozen=True)
class AutomatonConfig(Config):
    """Settings of an `AutomatonMemory`; the defaults are the paper's for language modelling.

    Attributes:
        k: neighbours of a search.
        temperature: what scores are divided by, or "auto" (see `KnnConfig`).
        min_knns: search when fewer pointers than this are alive; 0 never searches.
        max_knns: entries that pointers and their clusters contribute, at most.
        clusters: "auto" for those saved with the store if there are any, "none", or "given".
        multiplicity: "set" (an entry counts once), "legacy" (as often as it was reached: the
            published behaviour), or a number: "set", with that much added to the scaled score
            (a log-weight) of entries that a pointer leads to.
        successors: "documents" (the next entry of the same document), "all" (the next entry,
            whatever lies between: the published behaviour), or "given".
        scores: "exact" (all candidates by the store's keys) or "index" (as the index scores what
            it finds, and by the keys it reconstructs for pointers).
        index: "exact", or "auto" for the index saved with the store if there is one.
        history: positions that `crop` can take back.
    """

    k: int = 1024
    temperature: float | str = 1.0
    min_knns: int = 1
    max_knns: int = 1024
    clusters: str = "auto"
    multiplicity: str | float = "set"
    successors: str = "documents"
    scores: str = "exact"
    index: str = "auto"
    history: int = 32

    def __post_init__(self):
        check_k(self.k)
        if isinstance(self.temperature, str):
            check_choice("temperature", self.temperature, ("auto",))
        else:
            check_temperature(self.temperature)
        check(self.min_knns >= 0, f"min_knns must be at least 0, got {self.min_knns}")
        check(self.max_knns >= 1, f"max_knns must be at least 1, got {self.max_knns}")
        check(self.history >= 0, f"history must be at least 0, got {self.history}")
        check_choice("clusters", self.clusters, ("auto", "none", GIVEN))
        check_choice("successors", self.successors, _SUCCESSORS)
        check_choice("scores", self.scores, _SCORES)
        check_choice("index", self.index, ("auto", "exact"))
        if isinstance(self.multiplicity, str):
            check(
                self.multiplicity in _MULTIPLICITIES,
                f"multiplicity must be one of {', '.join(_MULTIPLICITIES)} or a number, got "
                f"'{self.multiplicity}'",
            )
        else:
            check(
                abs(self.multiplicity) < float("inf"),
                f"multiplicity must be a finite number, got {self.multiplicity}",
            )


class Past(NamedTuple):
    """What a row was after an earlier position: what `crop` goes back to.

    Attributes:
        entries: ``(earlier rows, width)``, as in `AutomatonState`.
        scores: alike.
        counters: ``(earlier rows, 4)``.
        rows: ``(rows,)`` int64, the earlier row that each row of today was; None: the same.
    """

    entries: Tensor
    scores: Tensor
    counters: Tensor
    rows: Tensor | None


class AutomatonState(NamedTuple):
    """Where each sequence stands in the automaton.

    Attributes:
        entries: ``(rows, width)`` int64, what the last `read` retrieved: found by search first,
            then pointers, then members of their clusters; -1 where there is none.
        scores: ``(rows, width)`` float, their similarity to the query (temperature not applied).
        pointers: ``(rows, pointers)`` int64, the successors of those that agreed with the token
            observed since, best first; -1 padding.
        asleep: ``(rows,)`` bool, rows whose last observed position was padding; None: none.
        counters: ``(rows, 4)`` int64: steps, searches, steps since the last search, and such steps
            that were followed by another search.
        history: what `crop` may go back to, oldest first.
        length: positions observed, padding included.
    """

    entries: Tensor
    scores: Tensor
    pointers: Tensor
    asleep: Tensor | None
    counters: Tensor
    history: tuple[Past, ...]
    length: int


class AutomatonMemory:
    """A store walked by pointers.

    Args:
        store: a `Datastore`, or anything that offers what `memory.knn.Store` lists.
        k: neighbours of a search; more than the store holds is clamped with a warning.
        temperature: above 0, or "auto".
        min_knns: search when fewer pointers than this are alive.
        max_knns: entries that pointers and clusters contribute per step, at most.
        clusters: `Clusters` of this store; "auto": those saved in the store's directory, if any;
            None: every entry is a state of its own.
        multiplicity: "set", "legacy" or a log-weight (see `AutomatonConfig`).
        successors: "documents", "all", or ``(entries,)`` integers, -1 for none.
        scores: "exact" or "index" (see `AutomatonConfig`).
        index: over the store's keys, "auto" or "exact".
        history: positions that `crop` can take back (assisted decoding: its draft's length).
        device: where keys and pointers are; the keys are kept there if they fit, else they are
            read from the store at every step.

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
        name = "none" if clusters is None else clusters
        exact = index == "exact" or isinstance(index, ExactIndex)
        self.config = AutomatonConfig(
            k=k,
            temperature=temperature,
            min_knns=min_knns,
            max_knns=max_knns,
            clusters=name if isinstance(name, str) else GIVEN,
            multiplicity=multiplicity,
            successors=successors if isinstance(successors, str) else GIVEN,
            scores=scores,
            index=index if isinstance(index, str) else ("exact" if exact else "auto"),
            history=history,
        )
        check(len(store) > 0, "the datastore must hold entries, got an empty one; extract it again")
        device = torch.device(device)
        keys = load_if_it_fits(store)
        self._in_memory = isinstance(keys, Tensor)
        keys = keys.to(device) if isinstance(keys, Tensor) else keys
        self._keys = as_keys(keys)
        if isinstance(index, str):
            directory = Path(getattr(store, "path", "")) / INDEX_DIRECTORY
            saved = index == "auto" and hasattr(store, "path") and has_index(directory)
            index = (
                load_index(directory, keys, store_fingerprint=store.fingerprint)
                if saved
                else ExactIndex(keys, store.metric, store_fingerprint=store.fingerprint)
            )
        searched = KnnMemory(store, k=k, temperature=temperature, index=index)
        self.store, self.index = store, searched.index
        self.k, self.temperature = searched.k, searched.temperature
        self.min_knns, self.max_knns = min_knns, max_knns
        self.device = device
        self._values = torch.as_tensor(store.values).reshape(-1).to(device)
        self.clusters = _find_clusters(store, name)
        self._table = None if self.clusters is None else cluster_table(self.clusters, device)
        following = _find_successors(store, successors)
        targets = following[following >= 0]
        self._merging = len(targets.unique()) < len(targets) if self.given_successors else False
        self._successors = following.to(device)

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
        for name, value in (("clusters", clusters), ("successors", successors)):
            check(
                (getattr(config, name) == GIVEN) == (value is not None),
                f"these settings {'need' if value is None else 'do not take'} {name} given by "
                f"hand; {'pass' if value is None else 'leave out'} {name}",
            )
        values = {name: getattr(config, name) for name in ("k", "temperature", "min_knns")}
        return cls(
            store,
            **values,
            max_knns=config.max_knns,
            clusters=config.clusters if clusters is None else clusters,
            multiplicity=config.multiplicity,
            successors=config.successors if successors is None else successors,
            scores=config.scores,
            index=config.index,
            history=config.history,
            device=device,
        )

    @property
    def given_successors(self) -> bool:
        """Whether successors were given by hand."""
        return self.config.successors == GIVEN

    def __len__(self) -> int:
        return len(self.store)

    # -- the walk ----------------------------------------------------------------------------

    def init_state(self, rows: int) -> AutomatonState:
        """No pointer is alive yet: the first read searches."""
        check(rows >= 1, f"rows must be at least 1, got {rows}")
        nothing = torch.empty(rows, 0, dtype=torch.int64, device=self.device)
        return AutomatonState(
            entries=nothing,
            scores=torch.empty(rows, 0, device=self.device),
            pointers=nothing,
            asleep=None,
            counters=torch.zeros(rows, 4, dtype=torch.int64, device=self.device),
            history=(),
            length=0,
        )

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
        rows = len(state.entries)
        check(
            tokens.dim() == 2 and len(tokens) == rows and keys.shape[:2] == tokens.shape,
            f"tokens (rows, time) and keys (rows, time, dim) must fit the state of {rows} rows, "
            f"got {tuple(tokens.shape)} and {tuple(keys.shape)}; make a new state for another batch",
        )
        for time in range(tokens.shape[1]):
            if time:
                state = self.read(keys[:, time - 1], state)[1]
            awake = None if valid is None else valid[:, time].to(self.device)
            state = self._step(tokens[:, time].to(self.device), awake, state)
        return state

    def _step(self, token: Tensor, awake: Tensor | None, state: AutomatonState) -> AutomatonState:
        entries = state.entries.clamp(min=0)
        keep = (state.entries >= 0) & (self._values[entries] == token.unsqueeze(1))
        keep &= self._successors[entries] >= 0
        if awake is not None:
            keep &= awake.unsqueeze(1)
        pointers = follow(state.entries, state.scores, keep, self._successors)
        if self._merging and self.config.multiplicity != "legacy":
            pointers = pointers.masked_fill(~first_copies(pointers), -1)
        past = Past(state.entries, state.scores, state.counters, None)
        history = (*state.history, past)[-self.config.history :] if self.config.history else ()
        return state._replace(
            pointers=pointers,
            asleep=None if awake is None else ~awake,
            history=history,
            length=state.length + 1,
        )

    @torch.no_grad()
    def read(self, query: Tensor, state: AutomatonState) -> tuple[Candidates, AutomatonState]:
        """Where the pointers lead, and what a search finds for rows that have too few.

        Args:
            query: ``(rows, dim)`` hidden states at the position observed last.
            state: with that position observed.

        Returns:
            Candidates ``(rows, width)`` in no particular order, on the query's device; no row is
            valid where nothing was found.

        Raises:
            InputError: if the query does not fit the state, or is not finite.
        """
        rows = len(state.entries)
        check(
            query.dim() == 2 and query.shape == (rows, self.store.dim),
            f"queries must be ({rows}, {self.store.dim}) like the state and the store, got "
            f"{tuple(query.shape)}; read with the rows that were observed",
        )
        place, query = query.device, query.to(self.device)
        query = query.to(torch.promote_types(query.dtype, torch.float32))
        searching = (state.pointers >= 0).sum(1) < self.min_knns
        if state.asleep is not None:
            searching &= ~state.asleep
        followed, on_pointer = self._extend(state.pointers)
        entries, scores = followed, None
        if bool(searching.any()):
            found, scores = self._search(query, searching)
            if self.config.multiplicity != "legacy":
                followed = followed.masked_fill(contains(found, followed), -1)
            entries = torch.cat([found, followed], dim=1)
            on_pointer = torch.cat([contains(state.pointers, found), on_pointer], dim=1)
        scores = self._score(query, entries, followed, scores)
        state = _remember(state, entries, scores, searching)
        candidates = self._candidates(entries, scores, on_pointer)
        if state.asleep is not None:
            candidates.valid[state.asleep] = False
        return Candidates(*(part.to(place) for part in candidates)), state

    def _extend(self, pointers: Tensor) -> tuple[Tensor, Tensor]:
        """Pointers and the members of their clusters, at most ``max_knns``, and which are which."""
        pointers = pointers[:, : self.max_knns]
        followed, on_pointer = pointers, torch.ones_like(pointers, dtype=torch.bool)
        if self._table is not None and pointers.shape[1]:
            more = members(pointers, self._table, self.max_knns)
            if self.config.multiplicity != "legacy":
                more = more.masked_fill(contains(pointers, more), -1)
            followed = torch.cat([pointers, more], dim=1)
            beyond = (followed >= 0).cumsum(1) > self.max_knns
            followed = followed.masked_fill(beyond, -1)
            on_pointer = torch.arange(followed.shape[1], device=self.device) < pointers.shape[1]
        return followed, on_pointer.expand_as(followed)

    def _search(self, query: Tensor, searching: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and scores ``(rows, k)`` for the rows that search; (-1, -inf) for the others."""
        rows = searching.nonzero().squeeze(-1)
        found = self.index.search(query[rows], self.k)
        ids = torch.full((len(query), self.k), -1, dtype=torch.int64, device=self.device)
        scores = torch.full(ids.shape, -torch.inf, dtype=found.scores.dtype, device=self.device)
        ids[rows], scores[rows] = found.ids.to(self.device), found.scores.to(self.device)
        return ids, scores

    def _score(
        self, query: Tensor, entries: Tensor, followed: Tensor, found: Tensor | None
    ) -> Tensor:
        """Similarity of every entry ``(rows, width)``, -inf where there is none."""
        if self.config.scores == "exact":
            return self._similarity(query, entries, self._keys.gather)
        reconstruct = getattr(self.index, "reconstruct", self._keys.gather)
        scores = self._similarity(query, followed, reconstruct)
        return scores if found is None else torch.cat([found.to(scores), scores], dim=1)

    def _similarity(self, query: Tensor, entries: Tensor, keys_of: Any) -> Tensor:
        scores = query.new_full(entries.shape, -torch.inf)
        row, column = (entries >= 0).nonzero(as_tuple=True)
        wanted = entries[row, column]
        parts = []
        size = max(1, _CHUNK_NUMBERS // query.shape[1])
        for some, ids in zip(row.split(size), wanted.split(size), strict=True):
            keys = keys_of(ids).to(query)
            parts.append(similarity(query[some], keys.unsqueeze(1), self.index.metric).squeeze(1))
        if parts:
            scores[row, column] = torch.cat(parts)
        return scores

    def _candidates(self, entries: Tensor, scores: Tensor, on_pointer: Tensor) -> Candidates:
        if entries.shape[1] == 0:  # at least one column, so that nobody has to ask
            entries = entries.new_full((len(entries), 1), -1)
            scores = scores.new_full(entries.shape, -torch.inf)
            on_pointer = torch.zeros_like(entries, dtype=torch.bool)
        scores = scores / self.temperature
        if not isinstance(self.config.multiplicity, str):
            scores = scores + self.config.multiplicity * on_pointer
        tokens = self._values[entries.clamp(min=0)].long()
        return Candidates(scores, tokens, entries, entries >= 0)

    def score(
        self, query: Tensor, targets: Tensor, state: AutomatonState
    ) -> tuple[TargetPartial, AutomatonState]:
        """The memory's mass, and the part of it on known next tokens.

        The targets do not enter the state; the next `observe` tells it what came.

        Args:
            query: ``(rows, dim)``, as for ``read``.
            targets: ``(rows,)`` int64.
            state: as for ``read``.
        """
        candidates, state = self.read(query, state)
        return target_partial(candidates, targets), state

    # -- state -------------------------------------------------------------------------------

    def select_rows(self, state: AutomatonState, index: Tensor) -> AutomatonState:
        """The state of the rows ``index``, copied or dropped."""
        index = index.to(self.device)
        history = tuple(
            past._replace(rows=index if past.rows is None else past.rows[index])
            for past in state.history
        )
        return AutomatonState(
            entries=state.entries[index],
            scores=state.scores[index],
            pointers=state.pointers[index],
            asleep=None if state.asleep is None else state.asleep[index],
            counters=state.counters[index],
            history=history,
            length=state.length,
        )

    def crop(self, state: AutomatonState, length: int) -> AutomatonState:
        """The state after only the first ``length`` positions were observed and read.

        Raises:
            InputError: if fewer were observed, or more would be taken back than ``history`` holds.
        """
        seen = state.length
        check(0 <= length <= seen, f"length must lie between 0 and {seen}, got {length}")
        if length == seen:
            return state
        fresh = self.init_state(len(state.entries))
        if length == 0:
            return fresh
        back = seen - length
        check(
            back <= len(state.history),
            f"at most {len(state.history)} positions can be taken back, got {back}; make the "
            f"memory with history={back} or more",
        )
        past = state.history[-back]
        rows = slice(None) if past.rows is None else past.rows
        return fresh._replace(
            entries=past.entries[rows],
            scores=past.scores[rows],
            counters=past.counters[rows],
            history=state.history[:-back],
            length=length,
        )

    # -- figures -----------------------------------------------------------------------------

    def stats(self, state: AutomatonState) -> dict[str, Any]:
        """Figures of all rows together.

        ``saved`` is the fraction of saved searches; ``foss_legacy`` is what the published code
        prints, which forgets the steps after the last search of each sequence (None before the
        first search).
        """
        steps, searches, _, saved = state.counters.sum(0).tolist()
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
        """Different states that a state leads to, on average."""
        here = (self._successors >= 0).nonzero().squeeze(-1)
        there = self._successors[here].long()
        if self._table is not None:
            here, there = (self._state_of(entries) for entries in (here, there))
        width = len(self) + (0 if self.clusters is None else len(self.clusters))
        return len((here * width + there).unique()) / self.states

    def _state_of(self, entries: Tensor) -> Tensor:
        cluster = self._table.cluster_of[entries].long()  # type: ignore[union-attr]
        return torch.where(cluster >= 0, cluster, entries + len(self.clusters))  # type: ignore[arg-type]

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
            "min_knns": self.min_knns,
            "max_knns": self.max_knns,
            "multiplicity": self.config.multiplicity,
            "successors": successors,
            "scores": self.config.scores,
            "keys": "in memory" if self._in_memory else "on disk",
            "clusters": None if self.clusters is None else self.clusters.describe(),
            "store": self.store.fingerprint,
            "index": self.index.describe(),
        }


def _remember(
    state: AutomatonState, entries: Tensor, scores: Tensor, searched: Tensor
) -> AutomatonState:
    """The state after a read; rows that were asleep stay as they were."""
    steps, searches, run, saved = state.counters.unbind(1)
    one = searched.long()
    counters = torch.stack(
        [steps + 1, searches + one, (run + 1) * (1 - one), saved + run * one], dim=1
    )
    if state.asleep is not None:
        missing = entries.shape[1] - state.entries.shape[1]
        pad = torch.nn.functional.pad
        old = pad(state.entries, (0, max(0, missing)), value=-1)
        old_scores = pad(state.scores, (0, max(0, missing)), value=-torch.inf).to(scores)
        new = pad(entries, (0, max(0, -missing)), value=-1)
        new_scores = pad(scores, (0, max(0, -missing)), value=-torch.inf)
        asleep = state.asleep.unsqueeze(1)
        entries = torch.where(asleep, old, new)
        scores = torch.where(asleep, old_scores, new_scores)
        counters = torch.where(asleep, state.counters, counters)
    return state._replace(entries=entries, scores=scores, counters=counters)


def _find_clusters(store: Store, clusters: Clusters | str) -> Clusters | None:
    if isinstance(clusters, Clusters):
        clusters.check_store(len(store), store.fingerprint)
        return clusters
    directory = Path(getattr(store, "path", "")) / AUTOMATON_DIRECTORY
    if clusters == "none" or not hasattr(store, "path") or not has_clusters(directory):
        return None
    return Clusters.load(directory, store_fingerprint=store.fingerprint)


def _find_successors(store: Store, successors: Tensor | str) -> Tensor:
    if isinstance(successors, Tensor):
        return check_successors(successors.detach().cpu(), len(store))
    if successors == "all":
        return next_entries(len(store))
    places = (getattr(store, name, None) for name in ("documents", "positions"))
    return next_entries(len(store), *places)
