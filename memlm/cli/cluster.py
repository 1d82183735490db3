"""``memlm cluster``: join the entries of a datastore into the states of an automaton."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import show


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Cluster the keys of a datastore: the states of RetoMaton's automaton.

    Interrupted, it continues when run again.
    """

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    clusters: int | None = None
    """How many clusters (default: one per 100 entries)."""
    sample: int | None = None
    """Keys the centroids are trained on, at most (default: 40 per cluster)."""
    iterations: int = 20
    """Iterations of k-means."""
    seed: int = 1
    """Of the sample and of k-means."""
    device: str = "cpu"
    """Where entries are assigned to clusters, e.g. "cuda"; the training is on the CPU."""
    threads: int | None = None
    """CPU threads (default: as torch and FAISS choose)."""
    plan: bool = False
    """Only say what would be done: sizes, training keys, operations."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Plan, train, assign."""
        from memlm.index.cluster import ClusterConfig, cluster_store, plan_clusters
        from memlm.index.partition import AUTOMATON_DIRECTORY
        from memlm.store.reader import Datastore

        store = Datastore.open(self.store)
        config = ClusterConfig(
            clusters=self.clusters,
            sample=self.sample,
            iterations=self.iterations,
            seed=self.seed,
        )
        plan = plan_clusters(len(store), store.dim, config)
        if self.plan:
            show(plan._asdict(), "\n".join((plan.text, *plan.warnings)), as_json=self.json)
            return 0
        if not self.json:
            show({}, plan.text, as_json=False)
        made = cluster_store(store, config, device=self.device, threads=self.threads)
        described = made.describe()
        text = (
            f"{store.path / AUTOMATON_DIRECTORY}: {described['states']:,} states, the largest of "
            f"{described['largest']:,} entries"
        )
        show(described, text, as_json=self.json)
        return 0
