"""``memlm index``: make a datastore searchable without reading every key."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from memlm.cli.options import show

if TYPE_CHECKING:
    from memlm.index.plan import IndexPlan
    from memlm.store.reader import Datastore
    from memlm.store.residency import Part


@dataclass(frozen=True, kw_only=True)
class BuildIndex:
    """Build a search index beside a datastore and measure how much of the truth it finds."""

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    type: Literal["auto", "ivfpq", "opq", "fastscan", "ivf", "hnsw", "flat", "exact"] = "ivfpq"
    """ivfpq: inverted lists of compressed keys (the papers'); opq: of rotated ones; fastscan: of \
4-bit codes; ivf: of keys in half precision; hnsw: a graph; flat: exact, FAISS; exact: exact, \
torch, no file; auto: exact for small stores, else ivfpq."""
    memory: float | None = None
    """Gigabytes the index may take: what finds most within them is built; needs --type auto."""
    factory: str = ""
    """A FAISS factory string such as "IVF1024,PQ32"; needs --type auto."""
    lists: int = 4096
    """Inverted lists; fewer for small stores."""
    code_size: int = 64
    """Bytes per compressed key."""
    nprobe: int = 32
    """Lists visited per query; more finds more and takes longer."""
    train_size: int = 1_000_000
    """Keys the index is trained on, at most."""
    seed: int = 1
    """Of the training sample."""
    threads: int | None = None
    """CPU threads (default: as FAISS chooses)."""
    plan: bool = False
    """Only say what would be built: sizes, memory, training points, and where each part lives."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Plan, build, measure."""
        from memlm.core.threads import multiply_adds_per_second
        from memlm.index.plan import IndexConfig, plan_index
        from memlm.methods.knn_lm import index_store
        from memlm.store.reader import Datastore
        from memlm.store.residency import residency_lines

        store = Datastore.open(self.store)
        config = IndexConfig(
            type="auto" if self.factory else self.type,
            factory=self.factory,
            metric=store.metric,
            lists=self.lists,
            code_size=self.code_size,
            nprobe=self.nprobe,
            train_size=self.train_size,
            memory=None if self.memory is None else int(self.memory * 1e9),
            seed=self.seed,
        )
        plan = plan_index(len(store), store.dim, config)
        seconds = plan.seconds(multiply_adds_per_second(self.threads)) if plan.operations else None
        text = plan.text if seconds is None else f"{plan.text}, about {seconds / 60:.1f} minutes"
        if self.plan:
            parts = self._parts(store, plan)
            value = {**asdict(plan), "seconds": seconds}
            value["parts"] = [part._asdict() for part in parts]
            lines = (text, *plan.warnings, *residency_lines(parts))
            show(value, "\n".join(lines), as_json=self.json)
            return 0
        if not self.json:
            show({}, text, as_json=False)
        described = index_store(store, config, threads=self.threads).describe()
        recall = described.get("recall")
        text = f"{store.path / 'index'}: {described.get('factory') or 'exact search'}"
        if recall:
            text += (
                f", recall@{recall['k']} {recall['value']:.3f} "
                f"on {recall['queries']} queries ({recall['source']})"
            )
        show(described, text, as_json=self.json)
        return 0

    def _parts(self, store: "Datastore", plan: "IndexPlan") -> "list[Part]":
        """Where keys, values and index would live when the store is searched."""
        from memlm.store.residency import plan_residency

        exact = plan.engine == "exact"
        return plan_residency(
            len(store),
            store.dim,
            store.dtype.itemsize,
            keys="ram" if exact else "disk",
            code_size=store.manifest.info.code_size,
            index="absent" if exact else "ram",
            index_bytes=0 if exact else plan.bytes,
            places=store.manifest.info.places,
        )
