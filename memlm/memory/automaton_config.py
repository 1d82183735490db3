"""Settings of the automaton memory, and what each of their names stands for in a given store."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.types import Index
from memlm.index.build import has_index, load_index
from memlm.index.exact import ExactIndex
from memlm.index.keys import KeySource
from memlm.index.metrics import check_choice, check_k
from memlm.index.partition import AUTOMATON_DIRECTORY, Clusters, has_clusters, read_record
from memlm.memory.knn import INDEX_DIRECTORY, Store, check_temperature
from memlm.memory.pointers import check_successors
from memlm.store.successors import next_entries

GIVEN = "given"


@dataclass(frozen=True)
class AutomatonConfig(Config):
    """Settings of an `AutomatonMemory`; the defaults are the paper's for language modelling.

    Attributes:
        k: neighbours of a search.
        temperature: what scores are divided by, or "auto" (see `KnnConfig`).
        min_knns: search when fewer pointers than this are alive; 0 never searches.
        max_knns: entries that pointers and their clusters contribute to a step, at most.
        clusters: "auto" for those saved with the store if there are any, "none", or "given".
        multiplicity: "set" (an entry counts once), "legacy" (as often as it was reached: the
            published behaviour), or a number: "set", with that much added to the scaled score
            (a log-weight) of entries that a pointer leads to.
        successors: "documents" (the next entry of the same document), "all" (the next entry,
            whatever lies between: the published behaviour), or "given".
        scores: "exact" (all candidates by the store's keys) or "index" (as the index scores what
            it finds, and by the keys it reconstructs for pointers: the published behaviour).
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
        check_choice("successors", self.successors, ("documents", "all", GIVEN))
        check_choice("scores", self.scores, ("exact", "index"))
        check_choice("index", self.index, ("auto", "exact"))
        if isinstance(self.multiplicity, str):
            check(
                self.multiplicity in ("set", "legacy"),
                f"multiplicity must be 'set', 'legacy' or a number, got '{self.multiplicity}'; "
                "use one of these",
            )
        else:
            check(
                abs(self.multiplicity) < float("inf"),
                f"multiplicity must be a finite number, got {self.multiplicity}",
            )


def find_index(store: Store, keys: Tensor | KeySource, index: Index | str) -> Index:
    """The index meant by a name: "auto" takes the one saved with the store, else is "exact"."""
    if not isinstance(index, str):
        return index
    directory = Path(getattr(store, "path", "")) / INDEX_DIRECTORY
    if index == "auto" and hasattr(store, "path") and has_index(directory):
        return load_index(directory, keys, store_fingerprint=store.fingerprint)
    return ExactIndex(keys, store.metric, store_fingerprint=store.fingerprint)


def name_of_index(index: Index | str) -> str:
    """How a config says which index: an exact one, or the one saved with the store."""
    if isinstance(index, str):
        return index
    return "exact" if isinstance(index, ExactIndex) else "auto"


def find_clusters(store: Store, clusters: Clusters | str | None) -> Clusters | None:
    """The clusters meant by a name: "auto" takes those saved with the store, if any.

    Raises:
        FingerprintError: if they were made of another store.
        InputError: if they are of another size, or were to be given and are not.
        CorruptStoreError: if the saved ones are damaged.
    """
    if clusters is None or isinstance(clusters, str):
        check(clusters != GIVEN, "clusters that are given must be passed, got only the word")
        directory = _directory(store)
        if clusters != "auto" or directory is None:
            return None
        clusters = Clusters.load(directory, store_fingerprint=store.fingerprint)
    clusters.check_store(len(store), store.fingerprint)
    return clusters


def name_of_clusters(store: Store, clusters: Clusters | str | None) -> str:
    """How a config says which clusters: "auto" where they are those saved with the store."""
    if clusters is None or isinstance(clusters, str):
        return clusters or "none"
    directory, identity = _directory(store), clusters.record.identity
    saved = directory is not None and identity and read_record(directory).identity == identity
    return "auto" if saved else GIVEN


def _directory(store: Store) -> Path | None:
    """Where the store's clusters are saved, None if they are not."""
    directory = Path(getattr(store, "path", "")) / AUTOMATON_DIRECTORY
    return directory if hasattr(store, "path") and has_clusters(directory) else None


def find_successors(store: Store, successors: Tensor | str) -> Tensor:
    """``(entries,)`` integers, -1 for none, as meant by a name.

    Raises:
        InputError: if those given do not point into the store, or are missing.
    """
    check(successors != GIVEN, "successors that are given must be passed, got only the word")
    documents, positions, known, dead, weights = (
        getattr(store, name, None)
        for name in ("documents", "positions", "successors", "dead", "weights")
    )
    if isinstance(successors, Tensor):
        following = check_successors(successors.detach().cpu(), len(store))
    elif successors == "all":
        check(
            weights is None,
            "successors 'all' must be those of a full store, but this one is pruned and keeps its "
            "own; use 'documents'",
        )
        following = next_entries(len(store))
    else:
        following = next_entries(len(store), documents, positions) if known is None else known
    if dead is None:
        return following
    return following.masked_fill((following >= 0) & dead[following.long().clamp(min=0)], -1)


def joins(store: Store, successors: Tensor, name: str) -> bool:
    """Whether two entries lead to one: never in a full store, unless they were given by hand."""
    if name != GIVEN and getattr(store, "weights", None) is None:
        return False
    pointing = successors[successors >= 0]
    return len(pointing.unique()) < len(pointing)
