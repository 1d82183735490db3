"""What will be built, and what it will cost, before anything is built.

The papers' preset is an inverted file of 4096 lists with 64-byte product codes, trained on a
million keys, 32 lists visited per query (kNN-LM, section 4). k-means wants at least 39 training
points per centroid, so a small store gets fewer lists, or exact search in FAISS; every departure
from what was asked is a warning with its numbers.

    bytes(IVF,PQ) = keys x (code_size + 8) + lists x dim x 4
    operations    = (10 x training keys + keys) x lists x dim + those of the codes
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from memlm.core.config import Config, check, check_at_least
from memlm.core.errors import InputError
from memlm.index.metrics import METRICS, check_choice

# FAISS's own threshold for k-means, what it uses of a larger sample, and its iterations.
POINTS_PER_CENTROID = 39
_MOST_POINTS_PER_CENTROID = 256
_LIST_ITERATIONS, _CODE_ITERATIONS = 10, 25
# Numbers (keys x dim) up to which "auto" searches exactly: about 8 ms a query on one core.
EXACT_NUMBERS = 1 << 28
_LINKS = 32  # of a key in a graph
_CODES = {"ivfpq": 256, "opq": 256, "fastscan": 16}  # centroids of one code


class _Kind(NamedTuple):
    """One type of approximate index.

    Attributes:
        factory: FAISS factory string of ``lists``, ``codes`` (sub-quantisers) and ``links``.
        note: what is compared for a query.
    """

    factory: str
    note: str


_KINDS = {
    "ivf": _Kind("IVF{lists},SQfp16", "keys of 2 bytes a number"),
    "ivfpq": _Kind("IVF{lists},PQ{codes}", "product codes"),
    "opq": _Kind("OPQ{codes},IVF{lists},PQ{codes}", "product codes of rotated keys"),
    "fastscan": _Kind("IVF{lists},PQ{codes}x4fs", "codes of 4 bits, in registers"),
    "hnsw": _Kind("HNSW{links},SQfp16", "keys along a graph"),
}
TYPES = ("auto", "exact", "flat", *_KINDS)


@dataclass(frozen=True)
class IndexConfig(Config):
    """How to index the keys of a store; the defaults are the papers' preset.

    Attributes:
        type: "exact" (torch, all keys) or "flat" (FAISS, all keys); inverted lists of keys in half
            precision ("ivf"), of product codes ("ivfpq"), of codes of rotated keys ("opq"), of
            4-bit codes that are scanned in registers ("fastscan"); a graph ("hnsw"); or "auto":
            exact up to 2^28 numbers (a million keys of 256), else "ivfpq"; with ``memory`` what
            finds most within it.
        factory: a FAISS factory string such as "OPQ32,IVF1024,PQ32" instead of a type.
        metric: "l2", "ip" or "cosine".
        lists: inverted lists.
        code_size: bytes per key of product codes; should divide the width of the keys.
        nprobe: lists visited per query.
        train_size: keys to train on, at most.
        memory: bytes the index may take, for "auto"; None: as many as it takes.
        seed: of the training sample, the clustering and the recall sample.
        recall_k: neighbours at which the recall is measured.
        recall_queries: queries it is measured on; 0 leaves it unmeasured.
    """

    type: str = "auto"
    factory: str = ""
    metric: str = "l2"
    lists: int = 4096
    code_size: int = 64
    nprobe: int = 32
    train_size: int = 1_000_000
    memory: int | None = None
    seed: int = 1
    recall_k: int = 1024
    recall_queries: int = 1000

    def __post_init__(self):
        check_choice("index type", self.type, TYPES)
        check_choice("metric", self.metric, METRICS)
        check(
            not self.factory or self.type == "auto",
            f"an index has a type or a factory string, got both '{self.type}' and "
            f"'{self.factory}'; leave the type at 'auto'",
        )
        check(
            self.memory is None or (self.type == "auto" and not self.factory),
            f"memory decides which index is built, got {self.memory} beside "
            f"'{self.factory or self.type}'; leave the type at 'auto'",
        )
        check_at_least(self, 1, "lists", "code_size", "nprobe", "train_size", "recall_k", "memory")
        check_at_least(self, 0, "recall_queries")


@dataclass(frozen=True)
class IndexPlan:
    """What ``build_index`` would do.

    Attributes:
        engine: "exact" or "faiss".
        factory: FAISS factory string, empty for "exact".
        train_size: keys to train on, 0 if nothing is trained.
        bytes: of the index, on disk and in memory; the keys themselves for "exact" (float16).
        operations: multiply-adds of training and filling; None where it is not known.
        warnings: departures from what was asked, one sentence each.
        text: the plan in one line, to print before building.
    """

    engine: str
    factory: str
    train_size: int
    bytes: int
    operations: float | None
    warnings: tuple[str, ...]
    text: str

    def seconds(self, speed: float) -> float | None:
        """How long building takes at ``speed`` multiply-adds per second; None if not known."""
        return None if self.operations is None else self.operations / speed


def plan_index(count: int, dim: int, config: IndexConfig) -> IndexPlan:
    """Work out type, sizes and cost for ``count`` keys of width ``dim``.

    Raises:
        InputError: if there are no keys, FAISS does not know the factory string, or no index fits
            into the memory.
    """
    check(count > 0, "an index needs at least one key, got an empty store; extract one first")
    if config.factory:
        size = min(config.train_size, count)
        stored = count * _code_bytes(dim, config)
        text = (
            f"index {config.factory} over {_keys(count, dim, config)}, {size:,} training keys, "
            f"{_size(stored)} or more"
        )
        return IndexPlan("faiss", config.factory, size, stored, None, (), text)
    if config.memory is not None:
        return _within(count, dim, config, config.memory)
    kind = config.type
    if kind == "auto":
        kind = "exact" if count * dim <= EXACT_NUMBERS else "ivfpq"
    return _plan(count, dim, config, kind)


def _within(count: int, dim: int, config: IndexConfig, memory: int) -> IndexPlan:
    """The index that finds most among those that fit: whole keys, then ever smaller codes."""
    kinds = ["exact"] * (count * dim <= EXACT_NUMBERS) + ["ivf"]
    tried = [_plan(count, dim, config, kind) for kind in kinds]
    size = dim // 2
    while size >= 1:
        tried.append(_plan(count, dim, replace(config, code_size=_divisor(dim, size)), "ivfpq"))
        size //= 2
    smallest = min(tried, key=lambda plan: plan.bytes)
    check(
        smallest.bytes <= memory,
        f"the smallest index of {count:,} keys takes {_size(smallest.bytes)} "
        f"({smallest.factory or 'exact'}), got {_size(memory)} of memory; allow more, or prune the "
        "store",
    )
    return next(plan for plan in tried if plan.bytes <= memory)


def _plan(count: int, dim: int, config: IndexConfig, kind: str) -> IndexPlan:
    keys = _keys(count, dim, config)
    if kind == "exact":
        stored = 2 * count * dim
        text = f"exact search over {keys}; no file, {_size(stored)} of keys in memory as float16"
        return IndexPlan("exact", "", 0, stored, 0.0, (), text)
    warnings: list[str] = []
    train_size = min(config.train_size, count)
    centroids = _CODES.get(kind, 0)
    if train_size < POINTS_PER_CENTROID * centroids:
        warnings.append(
            f"product codes need {POINTS_PER_CENTROID * centroids:,} training keys "
            f"({POINTS_PER_CENTROID} for each of {centroids} centroids), got {train_size:,}; "
            "building an exact flat index instead"
        )
        kind = "flat"
    if kind == "flat":
        stored = 4 * count * dim
        text = f"index Flat over {keys}, {_size(stored)}, every key compared"
        return IndexPlan("faiss", "Flat", 0, stored, 0.0, tuple(warnings), text)
    if kind == "hnsw":
        stored = count * (2 * dim + 2 * _LINKS * 4)
        factory = _KINDS[kind].factory.format(links=_LINKS)
        text = f"index {factory} over {keys}, {_size(stored)} or more, {_KINDS[kind].note}"
        return IndexPlan("faiss", factory, train_size, stored, None, tuple(warnings), text)
    lists = config.lists
    if lists * POINTS_PER_CENTROID > train_size:
        lists = max(1, train_size // POINTS_PER_CENTROID)
        warnings.append(
            f"{config.lists:,} lists need {config.lists * POINTS_PER_CENTROID:,} training keys "
            f"({POINTS_PER_CENTROID} each), got {train_size:,}; using {lists:,} lists"
        )
    codes = 0
    if centroids:
        per_byte = 2 if kind == "fastscan" else 1
        codes = _divisor(dim, per_byte * config.code_size)
        if codes != per_byte * config.code_size:
            warnings.append(
                f"code_size must divide the {dim} dimensions of the keys, got {config.code_size}; "
                f"using {codes / per_byte:g}"
            )
    width = {"ivf": 2 * dim, "fastscan": codes / 2}.get(kind, codes)
    stored = int(count * (width + 8) + lists * dim * 4 + (dim * dim * 4 if kind == "opq" else 0))
    nprobe = min(config.nprobe, lists)
    trained = min(train_size, _MOST_POINTS_PER_CENTROID * lists)
    coded = min(train_size, _MOST_POINTS_PER_CENTROID * centroids)
    operations = float(
        (_LIST_ITERATIONS * trained + count) * lists * dim
        + (_CODE_ITERATIONS * coded + count) * centroids * dim
        + (count * dim * dim if kind == "opq" else 0)
    )
    factory = _KINDS[kind].factory.format(lists=lists, codes=codes)
    text = (
        f"index {factory} over {keys}: {train_size:,} training keys, "
        f"{_size(stored)}, about {count * nprobe // lists:,} keys compared per query (nprobe "
        f"{nprobe}, {_KINDS[kind].note}), {operations:.2g} multiply-adds to build"
    )
    return IndexPlan("faiss", factory, train_size, stored, operations, tuple(warnings), text)


def _keys(count: int, dim: int, config: IndexConfig) -> str:
    return f"{count:,} keys of {dim} dimensions ({config.metric})"


def _divisor(dim: int, most: int) -> int:
    """The largest divisor of ``dim`` that is at most ``most``."""
    return max(size for size in range(1, min(dim, most) + 1) if dim % size == 0)


def _code_bytes(dim: int, config: IndexConfig) -> int:
    """Bytes per key of a factory string, as FAISS tells (8 more for the id); a graph's links aside.

    Raises:
        InputError: if FAISS does not know the string or refuses it for this width.
    """
    import faiss

    try:
        index = faiss.index_factory(dim, config.factory)
    except RuntimeError as error:
        raise InputError(
            f"factory must be a FAISS factory string for {dim} dimensions, got "
            f"'{config.factory}' ({str(error).rpartition(': ')[2]}); see the FAISS documentation"
        ) from error
    try:
        return index.sa_code_size() + 8
    except RuntimeError:  # graphs hold the vectors themselves
        return 4 * dim + 8


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
