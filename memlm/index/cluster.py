"""Clusters of keys: the states of RetoMaton's automaton (Alon et al. 2022, section 3.3).

Entries whose keys lie close together continue alike, so they are joined into one state and share
their pointers. The states are k-means clusters: centroids are trained on a seeded sample, then
every entry goes to its nearest centroid,

    cluster(e) = argmin_c |key_e - centroid_c|^2             (ties: the lower cluster)

Rule of thumb: one cluster per 100 entries (the paper: a million for the 103 million entries of
WikiText-103).

Work is kept as it is done: centroids once trained, then each block of assignments with a line in a
journal. A run that dies goes on after its last block and ends with the same bytes.

Differs from the papers' code: the sample is drawn by NumPy's current generator, and plain arrays
are kept instead of a pickled matrix (``formats.members`` reads those).
"""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import Config, check, check_at_least
from memlm.core.files import checksum, fingerprint, make_folder
from memlm.core.journal import Journal
from memlm.core.progress import bar
from memlm.core.threads import torch_threads
from memlm.index.exact import ExactIndex
from memlm.index.keys import KeySource, as_keys, sample_keys
from memlm.index.metrics import prepare_keys
from memlm.index.partition import (
    AUTOMATON_DIRECTORY,
    Clusters,
    has_clusters,
    read_record,
    read_tensors,
    write_tensors,
)
from memlm.index.plan import POINTS_PER_CENTROID

BUILDING = "building"
ENTRIES_PER_CLUSTER = 100
SAMPLE_PER_CLUSTER = 40
# What FAISS's k-means uses of a larger sample.
MOST_POINTS_PER_CENTROID = 256
_BLOCK_ROWS = 1 << 18


@dataclass(frozen=True)
class ClusterConfig(Config):
    """How to cluster the keys of a store.

    Attributes:
        clusters: how many; None: one per 100 entries.
        sample: keys the centroids are trained on, at most; None: 40 per cluster.
        iterations: of k-means.
        seed: of the sample and of k-means.
    """

    clusters: int | None = None
    sample: int | None = None
    iterations: int = 20
    seed: int = 1

    def __post_init__(self):
        check_at_least(self, 1, "clusters", "sample", "iterations")


class ClusterPlan(NamedTuple):
    """What `cluster_store` would do.

    Attributes:
        clusters: how many.
        sample: keys the centroids are trained on.
        bytes: of the file.
        operations: multiply-adds of the training and the assignment.
        warnings: departures from what was asked, one sentence each.
        text: the plan in one line, to print before clustering.
    """

    clusters: int
    sample: int
    bytes: int
    operations: int
    warnings: tuple[str, ...]
    text: str


def plan_clusters(count: int, dim: int, config: ClusterConfig) -> ClusterPlan:
    """Work out sizes and cost; fewer clusters than asked for where k-means would starve.

    Args:
        count: keys.
        dim: width of a key.
        config: what is wanted.

    Raises:
        InputError: if there are no keys.
    """
    check(count > 0, "clustering needs at least one key, got an empty store; extract one first")
    clusters = config.clusters or max(1, count // ENTRIES_PER_CLUSTER)
    sample = min(count, config.sample or SAMPLE_PER_CLUSTER * clusters)
    warning = ()
    if clusters * POINTS_PER_CENTROID > sample and clusters > 1:
        fewer = max(1, sample // POINTS_PER_CENTROID)
        warning = (
            f"{clusters:,} clusters need {clusters * POINTS_PER_CENTROID:,} keys to train on "
            f"({POINTS_PER_CENTROID} each), got {sample:,}; using {fewer:,} clusters",
        )
        clusters = fewer
    trained = min(sample, MOST_POINTS_PER_CENTROID * clusters)
    operations = (config.iterations * trained + count) * clusters * dim
    size = 8 * count + 8 * (clusters + 1)
    text = (
        f"{clusters:,} clusters of {count:,} keys of {dim} dimensions, trained on {trained:,} "
        f"keys: {operations:.2g} multiply-adds, {size / 1e6:.3g} MB"
    )
    return ClusterPlan(clusters, sample, size, operations, warning, text)


def cluster_store(
    store: KeySource,
    config: ClusterConfig | None = None,
    *,
    directory: Path | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    quiet: bool = False,
) -> Clusters:
    """Cluster all keys of a store, or continue where an interrupted run stopped.

    Args:
        store: a datastore, or another source of keys.
        config: how; None: the defaults.
        directory: where to keep the clusters; None: ``automaton`` in the store's directory, or
            nowhere if it has none. Finished clusters of the same settings are loaded.
        device: where entries are assigned; the centroids are trained on the CPU.
        threads: CPU threads; None: as they are.
        quiet: show no progress bar.

    Returns:
        The clusters. Departures from the config warn with a UserWarning.

    Raises:
        InputError: for no keys, or zero keys under metric "cosine".
        StoreError: if the directory cannot be written.
    """
    config = config or ClusterConfig()
    plan = plan_clusters(len(as_keys(store)), store.dim, config)
    for message in plan.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    if directory is None and hasattr(store, "path"):
        directory = Path(getattr(store, "path")) / AUTOMATON_DIRECTORY  # noqa: B009

    from memlm.index.faiss_index import faiss_threads

    with faiss_threads(threads), torch_threads(threads):
        return _Build(store, config, plan, directory, torch.device(device), quiet).run()


def train_centroids(
    sample: NDArray[np.float32],
    clusters: int,
    *,
    iterations: int = 20,
    seed: int = 1,
    spherical: bool = False,
) -> Tensor:
    """Centroids of ``sample`` by FAISS's k-means (Lloyd's iterations).

    Args:
        sample: ``(points, dim)`` float32; of more than 256 per cluster FAISS takes a subset.
        clusters: how many.
        iterations: of k-means.
        seed: of its start.
        spherical: keep centroids at length one (for points of length one).

    Returns:
        ``(clusters, dim)`` float32.
    """
    import faiss

    kmeans = faiss.Kmeans(
        sample.shape[1],
        clusters,
        niter=iterations,
        seed=seed,
        spherical=spherical,
        min_points_per_centroid=1,  # the plan has seen to it
        max_points_per_centroid=MOST_POINTS_PER_CENTROID,
    )
    kmeans.train(sample)
    return torch.from_numpy(np.asarray(kmeans.centroids, np.float32))


def assign(keys: Tensor, centroids: ExactIndex, metric: str = "l2") -> Tensor:
    """The nearest centroid of every key ``(rows, dim)``: ``(rows,)`` int32, ties to the lower."""
    nearest = centroids.search(prepare_keys(keys, metric), 1).ids
    return nearest.squeeze(-1).to("cpu", torch.int32)


class _Build:
    """One clustering from nothing, or from where the last attempt stopped, to the end."""

    def __init__(
        self,
        keys: KeySource,
        config: ClusterConfig,
        plan: ClusterPlan,
        directory: Path | None,
        device: torch.device,
        quiet: bool,
    ):
        import faiss

        self.keys, self.config, self.plan = keys, config, plan
        self.directory, self.device, self.quiet = directory, device, quiet
        self.metric = str(getattr(keys, "metric", "l2"))
        self.store_fingerprint = str(getattr(keys, "fingerprint", ""))
        self.faiss = faiss.__version__
        self.identity = fingerprint(
            {
                "config": config.to_dict(),
                "keys": [len(keys), keys.dim, self.metric, self.store_fingerprint],
                "faiss": self.faiss,
            }
        )

    def run(self) -> Clusters:
        directory = self.directory
        finished = directory is not None and has_clusters(directory)
        if directory is not None and finished and read_record(directory).identity == self.identity:
            shutil.rmtree(directory / BUILDING, ignore_errors=True)  # of a run that died at its end
            return Clusters.load(directory, store_fingerprint=self.store_fingerprint)
        pieces = _Pieces(None if directory is None else directory / BUILDING, self.identity)
        clusters = Clusters.from_assignment(
            self._assign(self._centroids(pieces), pieces),
            self.plan.clusters,
            sample=self.plan.sample,
            iterations=self.config.iterations,
            seed=self.config.seed,
            metric=self.metric,
            store_fingerprint=self.store_fingerprint,
            faiss=self.faiss,
            identity=self.identity,
        )
        if directory is not None:
            clusters.save(directory)
        pieces.remove()
        return clusters

    def _centroids(self, pieces: "_Pieces") -> ExactIndex:
        centroids = pieces.find("centroids")
        if centroids is None:
            centroids = train_centroids(
                sample_keys(self.keys, self.plan.sample, self.metric, self.config.seed),
                self.plan.clusters,
                iterations=self.config.iterations,
                seed=self.config.seed,
                spherical=self.metric == "cosine",
            )
            pieces.keep("centroids", centroids)
        return ExactIndex(centroids.to(self.device))

    def _assign(self, centroids: ExactIndex, pieces: "_Pieces") -> Tensor:
        cluster_of = torch.full((len(self.keys),), -1, dtype=torch.int32)
        with bar(len(self.keys), label="cluster", unit="key", quiet=self.quiet) as progress:
            for start, keys in self.keys.blocks(_BLOCK_ROWS):
                name = f"assigned-{start:012d}"
                block = pieces.find(name)
                if block is None or len(block) != len(keys):
                    block = assign(keys.to(self.device), centroids, self.metric)
                    pieces.keep(name, block)
                cluster_of[start : start + len(block)] = block
                progress.update(len(block))
        return cluster_of


class _Pieces:
    """Finished pieces of a build: each a file, and a line in a journal that vouches for it.

    Args:
        folder: where they are; None keeps nothing. Emptied if it belongs to another build.
        identity: of the build.
    """

    def __init__(self, folder: Path | None, identity: str):
        self._folder = folder
        self._checksums: dict[str, str] = {}
        if folder is None:
            return
        self._journal = Journal(folder / "journal.jsonl")
        lines = self._journal.read()
        if not any(line.get("build") == identity for line in lines[:1]):
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder)
            self._journal.append({"build": identity})
        for line in lines:
            self._checksums[str(line.get("piece"))] = str(line.get("checksum"))

    def find(self, name: str) -> Tensor | None:
        """The piece if an earlier run finished it, None otherwise."""
        if self._folder is None or name not in self._checksums:
            return None
        file = self._folder / f"{name}.safetensors"
        whole = file.is_file() and checksum(file) == self._checksums[name]
        return read_tensors(file)["piece"] if whole else None

    def keep(self, name: str, piece: Tensor) -> None:
        """Write a piece; on return it is on disk for good."""
        if self._folder is not None:
            file = self._folder / f"{name}.safetensors"
            write_tensors(file, piece=piece)
            self._journal.append({"piece": name, "checksum": checksum(file)})

    def remove(self) -> None:
        """Remove all pieces; a crash before it costs disk space and nothing else."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
