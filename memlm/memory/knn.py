"""The kNN memory: the tokens that followed the hidden states most like this one.

    p_kNN(y | q) = softmax over the k nearest entries j of (score_j / temperature), summed where
                   value_j = y                       (Khandelwal et al. 2020, eq. 2)

with score_j = -|q - key_j|^2 for metric "l2". Here only candidates and their scores are made; the
softmax belongs to the merge. The memory has no state: every position searches.

The scores are the index's own: exact with an exact index, those of the quantised keys with a
quantised one. `recompute=True` fetches the found keys from the store and computes their scores
exactly, in difference form. (Published results differ in this: WikiText-103 is 16.12 with it and
16.65 without.)

Differs from the papers' code: missing neighbours (FAISS id -1) are dropped instead of reading the
last entry of the store; dot products keep their sign; any temperature, also from the store's own
scale.
"""

import warnings
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.errors import FingerprintError
from memlm.core.types import Candidates, Index, TargetPartial
from memlm.index.build import has_index, index_of_codes, load_index
from memlm.index.exact import ExactIndex
from memlm.index.exclude import Exclusion, search_without
from memlm.index.keys import KeySource, drop_own, held_keys, load_if_it_fits
from memlm.index.metrics import check_choice, check_k
from memlm.index.plan import EXACT_NUMBERS
from memlm.index.record import IndexRecord
from memlm.memory.scores import similarity
from memlm.ops.tokens import target_partial
from memlm.ops.topk import ordered_topk
from memlm.store.codec import CODEC, CODEC_RECORD

INDEX_DIRECTORY = "index"
_CODED_ROWS = 1 << 18
# Bytes of keys gathered at a time when scores are recomputed.
_GATHER_BYTES = 1 << 26


class Store(KeySource, Protocol):
    """What the memory needs of a datastore: keys, the token after each, and who they are."""

    @property
    def values(self) -> Any:
        """``(entries,)`` integers, a tensor or an array: the token that followed each key."""
        ...

    @property
    def metric(self) -> str:
        """How keys are compared: "l2", "ip" or "cosine"."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the store's content."""
        ...


@dataclass(frozen=True)
class KnnConfig(Config):
    """Settings of a `KnnMemory`; the defaults are the paper's for language modelling.

    Attributes:
        k: neighbours per query.
        temperature: what scores are divided by; "auto": the median, over keys of the store, of
            nearest minus k-th nearest score, so that it follows the keys' scale.
        recompute: exact scores from the store's keys instead of the index's scores.
        index: "exact", or "auto" for the index saved with the store if there is one.
    """

    k: int = 1024
    temperature: float | str = 1.0
    recompute: bool = False
    index: str = "auto"

    def __post_init__(self):
        check_k(self.k)
        check_choice("index", self.index, ("auto", "exact"))
        if isinstance(self.temperature, str):
            check(
                self.temperature == "auto",
                f"temperature must be a number above 0 or 'auto', got '{self.temperature}'",
            )
        else:
            check_temperature(self.temperature)


class KnnMemory:
    """A store searched at every position: kNN-LM's memory.

    Args:
        store: a `Datastore`, or anything that offers what `Store` lists.
        k: neighbours per query; more than the store holds is clamped with a warning.
        temperature: above 0, or "auto" (see `KnnConfig`).
        index: over the store's keys; "exact" compares every key, with a warning if the store is
            large; "auto" takes the index saved in the store's directory, else is "exact".
        recompute: exact scores of the found entries from the store's keys.

    Attributes:
        config: the settings as given.
        temperature: the number in force.
        weights: ``(entries,)`` logarithms of the weights of a pruned store, else None.
        exclusion: what is never found: deleted entries.

    Raises:
        InputError: for an empty store, k or temperature out of range, or an index of another size
            or width.
        FingerprintError: for an index of another store.
    """

    def __init__(
        self,
        store: Store,
        *,
        k: int = 1024,
        temperature: float | str = 1.0,
        index: Index | str = "auto",
        recompute: bool = False,
    ):
        choice = "exact" if isinstance(index, ExactIndex) else "auto"
        self.config = KnnConfig(
            k=k,
            temperature=temperature,
            recompute=recompute,
            index=index if isinstance(index, str) else choice,
        )
        check(
            len(store) > 0,
            "a kNN memory needs at least one entry, got an empty store; extract one first",
        )
        if isinstance(index, str):
            check_choice("index", index, ("auto", "exact"))
            saved = _saved_index(store) if index == "auto" else None
            index = _exact_index(store) if saved is None else saved
        _check_index(index, store)
        if k > len(store):
            warnings.warn(
                f"k must be at most the store's {len(store)} entries, got {k}; using {len(store)}",
                UserWarning,
                stacklevel=2,
            )
        self.store = store
        self.index = index
        self.k = min(k, len(store))
        self.recompute = recompute
        self._values = torch.as_tensor(store.values).reshape(-1)
        check(
            len(self._values) == len(store),
            f"the store must have {len(store)} values, one per key, got {len(self._values)}; "
            "extract it again",
        )
        weights, dead = getattr(store, "weights", None), getattr(store, "dead", None)
        self.weights = None if weights is None else weights.float().log()
        self.exclusion = None if dead is None else Exclusion(dead)
        self.temperature = (
            typical_spread(index, store, self.k)
            if isinstance(temperature, str)
            else float(temperature)
        )

    @classmethod
    def from_config(cls, store: Store, config: KnnConfig) -> "KnnMemory":
        """The memory with the settings ``config``."""
        return cls(
            store,
            k=config.k,
            temperature=config.temperature,
            index=config.index,
            recompute=config.recompute,
        )

    def leaving_out(self, first: Tensor, end: Tensor) -> "KnnMemory":
        """The same memory for the next read only: each query does not see a range of its own.

        Args:
            first: ``(queries,)`` int64, the first entry that each query must not see.
            end: ``(queries,)`` int64, one past the last; ``first`` where it may see all.
        """
        guarded = copy(self)
        dead = None if self.exclusion is None else self.exclusion.dead
        guarded.exclusion = Exclusion(dead, first, end)
        return guarded

    def changed(self, k: int, temperature: float) -> "KnnMemory":
        """The same store and index with other settings, e.g. those that `tune` found."""
        return KnnMemory(
            self.store,
            k=k,
            temperature=temperature,
            index=self.index,
            recompute=self.recompute,
        )

    def __len__(self) -> int:
        return len(self.store)

    def init_state(self, rows: int) -> None:
        """None: nothing is remembered between positions."""

    @torch.no_grad()
    def read(self, query: Tensor, state: None = None) -> tuple[Candidates, None]:
        """The k nearest entries of every query.

        Args:
            query: ``(..., dim)`` hidden states; leading dimensions are flattened to ``queries``.
            state: ignored.

        Returns:
            Candidates ``(queries, k)`` in descending order of score, on the query's device.

        Raises:
            InputError: for another width or non-finite queries.
        """
        query = query.reshape(-1, query.shape[-1])
        found = search_without(self.index, query, self.k, self.exclusion)
        valid = found.ids >= 0
        scores, ids = found.scores, found.ids
        if self.recompute:
            scores, ids = self._exact(query, ids, valid)
            valid = ids >= 0
        entries = ids.clamp(min=0).to(self._values.device)
        tokens = self._values[entries].to(ids.device, torch.int64)
        scores = weighted(scores / self.temperature, ids, self.weights)
        return Candidates(scores, tokens, ids, valid), None

    def score(
        self, query: Tensor, targets: Tensor, state: None = None
    ) -> tuple[TargetPartial, None]:
        """The memory's mass, and the part of it on known next tokens.

        Args:
            query: ``(..., dim)``, flattened to ``queries``.
            targets: ``(...)`` int64, flattened alike.
            state: ignored.
        """
        candidates, _ = self.read(query)
        return target_partial(candidates, targets.reshape(-1)), None

    def observe(
        self, tokens: Tensor, keys: Tensor, state: None = None, valid: Tensor | None = None
    ) -> None:
        """Nothing: the store does not change."""

    def select_rows(self, state: None, index: Tensor) -> None:
        """Nothing to select."""

    def crop(self, state: None, length: int) -> None:
        """Nothing to take back."""

    def stats(self, state: None = None) -> dict[str, Any]:
        """Size and cost: one search per position."""
        return {"entries": len(self), "k": self.k, "searches_per_position": 1, "off": False}

    def describe(self) -> dict[str, Any]:
        """Settings in force, the store's fingerprint, and the index with its recall."""
        return {
            "memory": "knn",
            "entries": len(self),
            "k": self.k,
            "temperature": self.temperature,
            "recompute": self.recompute,
            **store_state(self.store),
            "index": self.index.describe(),
        }

    def _exact(self, query: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the found entries from the store's keys, and the ids in their new order."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = query.to(dtype)
        rows = max(1, _GATHER_BYTES // (ids.shape[1] * query.shape[1] * query.element_size()))
        parts = [query.new_empty(0, ids.shape[1])]
        for some, entries in zip(query.split(rows), ids.clamp(min=0).split(rows), strict=True):
            keys = self.store.gather(entries.cpu()).to(some.device, dtype)
            parts.append(similarity(some, keys, self.index.metric))
        scores = torch.cat(parts).masked_fill(~valid, -torch.inf)
        return ordered_topk(scores, ids.shape[1], ids)


def typical_spread(
    index: Index, keys: KeySource, k: int, *, sample: int = 256, seed: int = 1
) -> float:
    """The median over a sample of keys of the nearest minus the k-th nearest score.

    As a temperature it makes the k-th neighbour weigh exp(-1) of the first. Every sampled key is a
    query with its own entry left out. 1.0 if there is no spread (a store of copies).

    Args:
        index: over ``keys``.
        keys: of the store.
        k: neighbours.
        sample: keys to try.
        seed: of the sample.
    """
    own, held = held_keys(keys, sample, seed)
    found = index.search(held, min(k, len(keys) - 1) + 1)
    scores, ids = drop_own(found.scores.cpu(), found.ids.cpu(), own)
    count = (ids >= 0).sum(-1)
    some = count > 0
    if not some.any():
        return 1.0
    last = scores[some].gather(1, count[some].unsqueeze(-1) - 1).squeeze(-1)
    spread = float((scores[some, 0] - last).median())
    return spread if spread > 0 else 1.0


def weighted(scores: Tensor, ids: Tensor, weights: Tensor | None) -> Tensor:
    """Scores of entries that stand for several: an entry of weight w counts w times.

    Args:
        scores: ``(queries, n)``, divided by the temperature. (The published code adds the weight
            before it divides.)
        ids: ``(queries, n)`` entries, -1 for none.
        weights: ``(entries,)`` logarithms, or None.
    """
    return scores if weights is None else scores + weights.to(scores.device)[ids.clamp(min=0)]


def store_state(store: Store) -> dict[str, Any]:
    """Which store, and how many of its entries are dead, to print with results."""
    dead = getattr(store, "dead", None)
    return {"store": store.fingerprint, "dead": 0 if dead is None else int(dead.sum())}


def check_temperature(temperature: float) -> None:
    """Raise InputError unless the temperature is a finite number above 0."""
    check(
        0 < temperature < float("inf"),
        f"temperature must be a finite number above 0, got {temperature}",
    )


def _saved_index(store: Store) -> Index | None:
    if getattr(store, "codec", None) is not None:
        return _coded_index(store)
    directory = Path(getattr(store, "path", "")) / INDEX_DIRECTORY
    if not hasattr(store, "path") or not has_index(directory):
        return None
    return load_index(directory, store, store_fingerprint=store.fingerprint)


def _coded_index(store: Any) -> Index:
    """The index of a store of codes, made of the codes."""
    record = replace(
        IndexRecord.read(store.path, CODEC_RECORD),
        entries=len(store),
        store_fingerprint=store.fingerprint,
    )
    return index_of_codes(store.path / CODEC, record, store.stored_blocks(_CODED_ROWS))


def _exact_index(store: Store) -> Index:
    if len(store) * store.dim > EXACT_NUMBERS:
        milliseconds = 8 * len(store) * store.dim / EXACT_NUMBERS
        warnings.warn(
            f"without an approximate index all {len(store):,} keys are compared, about "
            f"{milliseconds:.0f} ms per query on one core; build an index for faster, approximate "
            "search",
            UserWarning,
            stacklevel=3,
        )
    return ExactIndex(load_if_it_fits(store), store.metric, store_fingerprint=store.fingerprint)


def _check_index(index: Index, store: Store) -> None:
    check(
        len(index) == len(store),
        f"the index must hold the store's {len(store)} entries, got {len(index)}; build the index "
        "of this store",
    )
    dim = getattr(index, "dim", store.dim)
    check(
        dim == store.dim,
        f"the index must have the store's {store.dim} dimensions, got {dim}; build the index of "
        "this store",
    )
    fingerprint = getattr(index, "store_fingerprint", "")
    if fingerprint and fingerprint != store.fingerprint:
        raise FingerprintError(
            f"the index was built from store {fingerprint} but is used with store "
            f"{store.fingerprint}; build an index for this store or open the one it belongs to"
        )
