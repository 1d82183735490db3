"""A partition of a store's entries into clusters, in memory and on disk.

Two views of one thing: the cluster of every entry, and the members of every cluster as compressed
rows (``members[offsets[c]:offsets[c + 1]]``, ascending). An entry may be in no cluster (-1): then
it is a state of its own. (The published code reads such entries as members of cluster 0.)

    automaton/clusters.safetensors     offsets, members, cluster
    automaton/automaton.json           how they were made, of which store, and the checksum
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.core.files import (
    checksum,
    make_folder,
    read_json,
    remove,
    write_atomic,
    write_json,
)

AUTOMATON_DIRECTORY = "automaton"
RECORD_FILE = "automaton.json"
CLUSTERS_FILE = "clusters.safetensors"


@dataclass(frozen=True)
class ClusterRecord(Config):
    """The content of ``automaton.json``.

    Attributes:
        entries: of the store.
        clusters: how many there are.
        sample: keys the centroids were trained on.
        iterations: of k-means.
        seed: of the sample and of k-means.
        metric: of the keys.
        store_fingerprint: of the store, empty if it was never told.
        faiss: version that trained the centroids.
        identity: of the build: settings, store and versions.
        largest: members of the largest cluster.
        empty: clusters without members.
        checksum: of ``clusters.safetensors``.
    """

    entries: int
    clusters: int
    sample: int = 0
    iterations: int = 0
    seed: int = 0
    metric: str = "l2"
    store_fingerprint: str = ""
    faiss: str = ""
    identity: str = ""
    largest: int = 0
    empty: int = 0
    checksum: str = ""


@dataclass(frozen=True, eq=False)
class Clusters:
    """A partition of a store's entries.

    Attributes:
        offsets: ``(clusters + 1,)`` int64, where each cluster's members begin.
        members: ``(assigned,)`` int32 or int64 entries, ascending inside a cluster.
        cluster_of: ``(entries,)`` int32, -1 for an entry that is a state of its own.
        record: how they were made.
    """

    offsets: Tensor
    members: Tensor
    cluster_of: Tensor
    record: ClusterRecord

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def states(self) -> int:
        """Clusters that have members, and entries that belong to none."""
        return int((self.offsets.diff() > 0).sum()) + len(self.cluster_of) - len(self.members)

    @classmethod
    def from_assignment(
        cls, cluster_of: Tensor, count: int | None = None, **known: Any
    ) -> "Clusters":
        """Clusters from the cluster of every entry.

        Args:
            cluster_of: ``(entries,)`` integers, -1 for none.
            count: how many clusters there are; None: up to the highest that occurs.
            known: further fields of `ClusterRecord`.

        Raises:
            InputError: for another shape or a cluster out of range.
        """
        check(
            cluster_of.dim() == 1 and not cluster_of.is_floating_point(),
            f"cluster_of must be (entries,) integers, got {tuple(cluster_of.shape)} of "
            f"{cluster_of.dtype}",
        )
        highest = int(cluster_of.max()) if len(cluster_of) else -1
        count = highest + 1 if count is None else count
        lowest = int(cluster_of.min()) if len(cluster_of) else 0
        check(
            lowest >= -1 and highest < count,
            f"clusters must lie between -1 (none) and {count - 1}, got {lowest} to {highest}",
        )
        cluster_of = cluster_of.to(torch.int32)
        sizes = torch.bincount(cluster_of[cluster_of >= 0], minlength=count)
        offsets = torch.zeros(count + 1, dtype=torch.int64)
        offsets[1:] = sizes.cumsum(0)
        order = torch.argsort(cluster_of, stable=True)[len(cluster_of) - int(offsets[-1]) :]
        members = order.to(_entry_dtype(len(cluster_of)))
        record = ClusterRecord(
            entries=len(cluster_of),
            clusters=count,
            largest=int(sizes.max()) if count else 0,
            empty=int((sizes == 0).sum()),
            **known,
        )
        return cls(offsets, members, cluster_of, record)

    @classmethod
    def from_members(
        cls,
        offsets: Tensor | NDArray[Any],
        members: Tensor | NDArray[Any],
        entries: int,
        **known: Any,
    ) -> "Clusters":
        """Clusters from their members, as the published files hold them.

        Args:
            offsets: ``(clusters + 1,)`` integers, ascending from 0.
            members: ``(assigned,)`` entries; entries that are missing belong to no cluster.
            entries: of the store.
            known: further fields of `ClusterRecord`.

        Raises:
            InputError: if the rows are not a partition of (some) entries of the store.
        """
        offsets, members = torch.as_tensor(offsets).long(), torch.as_tensor(members).long()
        check(
            len(offsets) >= 1
            and int(offsets[0]) == 0
            and int(offsets[-1]) == len(members)
            and bool((offsets.diff() >= 0).all()),
            f"offsets must rise from 0 to the {len(members)} members, got {len(offsets)} of them "
            f"up to {int(offsets[-1]) if len(offsets) else 'nowhere'}",
        )
        low, high = (int(members.min()), int(members.max())) if len(members) else (0, -1)
        check(
            low >= 0 and high < entries,
            f"members must be entries of the store, 0 to {entries - 1}, got {low} to {high}; use "
            "the clusters that were made of this store",
        )
        cluster_of = torch.full((entries,), -1, dtype=torch.int32)
        clusters = torch.arange(len(offsets) - 1, dtype=torch.int32)
        cluster_of[members] = clusters.repeat_interleave(offsets.diff())
        assigned = int((cluster_of >= 0).sum())
        check(
            assigned == len(members),
            f"an entry must belong to one cluster at most, got {len(members)} members but only "
            f"{assigned} different entries",
        )
        return cls.from_assignment(cluster_of, len(offsets) - 1, **known)

    def without(self, dead: Tensor | None) -> "Clusters":
        """The same clusters without the members that ``dead`` ``(entries,)`` bool marks."""
        if dead is None:
            return self
        return Clusters.from_assignment(self.cluster_of.masked_fill(dead, -1), len(self))

    def describe(self) -> dict[str, Any]:
        """Sizes and settings, to print with results: no paths and no checksums."""
        record = self.record
        values = {"clusters": len(self), "states": self.states, "largest": record.largest}
        if record.faiss:
            values |= {
                "sample": record.sample,
                "iterations": record.iterations,
                "seed": record.seed,
                "faiss": record.faiss,
            }
        return values

    def check_store(self, entries: int, store_fingerprint: str) -> None:
        """Refuse another store.

        Raises:
            FingerprintError: if both fingerprints are known and differ.
            InputError: if the number of entries differs.
        """
        known = self.record.store_fingerprint
        if known and store_fingerprint and known != store_fingerprint:
            raise FingerprintError(
                f"the clusters were made of store {known} but are used with store "
                f"{store_fingerprint}; cluster this store or open the one they belong to"
            )
        check(
            len(self.cluster_of) == entries,
            f"the clusters must cover the store's {entries} entries, got "
            f"{len(self.cluster_of)}; cluster this store",
        )

    def save(self, directory: Path) -> None:
        """Write ``clusters.safetensors`` and then ``automaton.json``, each whole or not at all."""
        directory = Path(directory)
        make_folder(directory)
        # Without its record the file means nothing, so a crash between the two leaves no clusters.
        remove(directory / RECORD_FILE)
        file = directory / CLUSTERS_FILE
        write_tensors(file, offsets=self.offsets, members=self.members, cluster=self.cluster_of)
        write_json(directory / RECORD_FILE, replace(self.record, checksum=checksum(file)).to_dict())

    @classmethod
    def load(cls, directory: Path, *, store_fingerprint: str = "") -> Self:
        """The clusters that ``save`` wrote.

        Args:
            directory: with ``automaton.json``.
            store_fingerprint: of the store in use, if known.

        Raises:
            CorruptStoreError: if a file is missing or is not what the record says.
            FingerprintError: if they were made of another store.
        """
        directory = Path(directory)
        record = read_record(directory)
        file = directory / CLUSTERS_FILE
        found = checksum(file) if file.is_file() else "no file"
        if found != record.checksum:
            raise CorruptStoreError(
                f"{file} must have checksum {record.checksum} but has {found}; it was changed or "
                "damaged: cluster the store again"
            )
        tensors = read_tensors(file)
        try:
            clusters = cls(tensors["offsets"], tensors["members"], tensors["cluster"], record)
        except KeyError as error:
            raise CorruptStoreError(
                f"{file} must hold {error} but does not; cluster the store again"
            ) from error
        if (len(clusters), len(clusters.cluster_of)) != (record.clusters, record.entries):
            raise CorruptStoreError(
                f"{file} must hold {record.clusters} clusters of {record.entries} entries, got "
                f"{len(clusters)} of {len(clusters.cluster_of)}; cluster the store again"
            )
        clusters.check_store(record.entries, store_fingerprint)
        return clusters


def has_clusters(directory: Path) -> bool:
    """Whether finished clusters are saved in ``directory``."""
    return (Path(directory) / RECORD_FILE).is_file()


def _entry_dtype(entries: int) -> torch.dtype:
    return torch.int32 if entries <= torch.iinfo(torch.int32).max else torch.int64


def write_tensors(path: Path, **tensors: Tensor) -> None:
    """Write a safetensors file whole or not at all."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomic(path, lambda file: file.write(data))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CorruptStoreError: if it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptStoreError(
            f"{path} must be a safetensors file but cannot be read ({error}); cluster the store "
            "again"
        ) from error


def read_record(directory: Path) -> ClusterRecord:
    """The record in ``directory``.

    Raises:
        CorruptStoreError: if it is missing, does not parse, or lacks or adds fields.
    """
    path = directory / RECORD_FILE
    try:
        return ClusterRecord.from_dict(read_json(path))
    except (InputError, TypeError) as error:
        raise CorruptStoreError(
            f"{path} must describe clusters but does not ({error}); cluster the store again"
        ) from error
