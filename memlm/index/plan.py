"""What will be built, and what it will cost, before anything is built.

The papers' preset is an inverted file of 4096 lists with 64-byte product codes, trained on a
million keys, 32 lists visited per query (kNN-LM, section 4). k-means wants at least 39 training
points per centroid, so a small store gets fewer lists, or exact search in FAISS; every departure
from what was asked is a warning with its numbers.

    bytes(IVF,PQ) = keys x (code_size + 8) + lists x dim x 4
"""

from dataclasses import dataclass

from memlm.core.config import Config, check
from memlm.core.errors import InputError
from memlm.index.metrics import METRICS, check_choice

TYPES = ("auto", "exact", "flat", "ivfpq")

# FAISS's own threshold for k-means, and the centroids of one byte of a product code.
POINTS_PER_CENTROID = 39
_CODE_CENTROIDS = 256
# Numbers (keys x dim) up to which "auto" searches exactly: about 8 ms a query on one core.
EXACT_NUMBERS = 1 << 28


@dataclass(frozen=True)
class IndexConfig(Config):
    """How to index the keys of a store; the defaults are the papers' preset.

    Attributes:
        type: "exact" (torch, all keys), "flat" (FAISS, all keys), "ivfpq" (FAISS, approximate), or
            "auto": exact up to 2^28 numbers (a million keys of 256), else "ivfpq".
        factory: a FAISS factory string such as "OPQ32,IVF1024,PQ32" instead of a type.
        metric: "l2", "ip" or "cosine".
        lists: inverted lists of "ivfpq".
        code_size: bytes per key of "ivfpq"; should divide the width of the keys.
        nprobe: lists visited per query.
        train_size: keys to train on, at most.
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
        for name in ("lists", "code_size", "nprobe", "train_size", "recall_k"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        check(
            self.recall_queries >= 0,
            f"recall_queries must be at least 0, got {self.recall_queries}",
        )


@dataclass(frozen=True)
class IndexPlan:
    """What ``build_index`` would do.

    Attributes:
        engine: "exact" or "faiss".
        factory: FAISS factory string, empty for "exact".
        train_size: keys to train on, 0 if nothing is trained.
        bytes: of the index, on disk and in memory; the keys themselves for "exact" (float16).
        warnings: departures from what was asked, one sentence each.
        text: the plan in one line, to print before building.
    """

    engine: str
    factory: str
    train_size: int
    bytes: int
    warnings: tuple[str, ...]
    text: str


def plan_index(count: int, dim: int, config: IndexConfig) -> IndexPlan:
    """Work out type, sizes and cost for ``count`` keys of width ``dim``.

    Raises:
        InputError: if there are no keys, or FAISS does not know the factory string.
    """
    check(count > 0, "an index needs at least one key, got an empty store; extract one first")
    kind = config.type
    if kind == "auto":
        kind = "exact" if count * dim <= EXACT_NUMBERS else "ivfpq"
    keys = f"{count:,} keys of {dim} dimensions ({config.metric})"
    if config.factory:
        size = min(config.train_size, count)
        stored = count * _code_bytes(dim, config)
        text = (
            f"index {config.factory} over {keys}, {size:,} training keys, {_size(stored)} or more"
        )
        return IndexPlan("faiss", config.factory, size, stored, (), text)
    if kind == "exact":
        stored = 2 * count * dim
        text = f"exact search over {keys}; no file, {_size(stored)} of keys in memory as float16"
        return IndexPlan("exact", "", 0, stored, (), text)
    warnings: list[str] = []
    train_size = min(config.train_size, count)
    if kind == "ivfpq" and train_size < POINTS_PER_CENTROID * _CODE_CENTROIDS:
        warnings.append(
            f"product codes need {POINTS_PER_CENTROID * _CODE_CENTROIDS:,} training keys "
            f"({POINTS_PER_CENTROID} for each of {_CODE_CENTROIDS} centroids), got {train_size:,}; "
            "building an exact flat index instead"
        )
        kind = "flat"
    if kind == "flat":
        stored = 4 * count * dim
        text = f"index Flat over {keys}, {_size(stored)}, every key compared"
        return IndexPlan("faiss", "Flat", 0, stored, tuple(warnings), text)
    lists, code_size = config.lists, _divisor(dim, config.code_size)
    if lists * POINTS_PER_CENTROID > train_size:
        lists = train_size // POINTS_PER_CENTROID
        warnings.append(
            f"{config.lists:,} lists need {config.lists * POINTS_PER_CENTROID:,} training keys "
            f"({POINTS_PER_CENTROID} each), got {train_size:,}; using {lists:,} lists"
        )
    if code_size != config.code_size:
        warnings.append(
            f"code_size must divide the {dim} dimensions of the keys, got {config.code_size}; "
            f"using {code_size}"
        )
    stored = count * (code_size + 8) + lists * dim * 4
    nprobe = min(config.nprobe, lists)
    text = (
        f"index IVF{lists},PQ{code_size} over {keys}: {train_size:,} training keys, "
        f"{_size(stored)}, about {count * nprobe // lists:,} keys compared per query (nprobe "
        f"{nprobe})"
    )
    return IndexPlan(
        "faiss", f"IVF{lists},PQ{code_size}", train_size, stored, tuple(warnings), text
    )


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
