"""FAISS behind the house's contract: higher is nearer, ids are entries, nothing is hidden.

FAISS (Johnson et al. 2017) answers with squared distances for L2 (smaller is nearer), pads with id
-1 when it finds fewer than k, orders ties arbitrarily, wants float32, and hides ``nprobe`` inside
wrapped indexes. All of that is put right here, and only here. The papers use
``IVF4096,PQ64`` with nprobe 32 (kNN-LM, Khandelwal et al. 2020, section 4; RetoMaton, appendix A).

Scores of a quantised index are those of the quantised keys. Ties are ordered by id among the
entries that FAISS returns; which of several equal ones it returns at the k boundary is its choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError, MissingExtraError
from memlm.core.faiss_files import read_faiss, write_faiss
from memlm.core.files import checksum, make_folder, remove
from memlm.core.types import SearchResult
from memlm.index.metrics import METRICS, check_choice, check_k, prepare_queries
from memlm.index.record import FAISS_FILE, RECORD_FILE, IndexRecord
from memlm.ops.topk import ordered_topk

RESIDENCIES = ("ram", "disk", "gpu")


class FaissIndex:
    """Any trained and filled FAISS index over entries 0..n-1 of a store.

    Args:
        index: a FAISS index; its ids are the entries.
        metric: "l2" for an L2 index, "ip" for an inner product one, "cosine" for an inner product
            one whose keys were scaled to length one.
        nprobe: inverted lists to visit, also of wrapped indexes; None leaves it; without lists it
            means nothing and is ignored.
        threads: OpenMP threads of a search; None: as they are.
        record: what is known about how it was built.

    Raises:
        InputError: for an empty index or a metric that the FAISS index was not made for.
    """

    def __init__(
        self,
        index: Any,
        metric: str = "l2",
        *,
        nprobe: int | None = None,
        threads: int | None = None,
        record: IndexRecord | None = None,
    ):
        check_choice("metric", metric, METRICS)
        made_for = "l2" if index.metric_type == faiss.METRIC_L2 else "ip or cosine"
        check(
            metric in made_for.split(" or "),
            f"the FAISS index was made for metric {made_for}, got '{metric}'; pass that metric or "
            "build the index again",
        )
        check(index.ntotal > 0, "the FAISS index must hold keys, got an empty one; add keys first")
        check(nprobe is None or nprobe >= 1, f"nprobe must be at least 1, got {nprobe}")
        self._index = index
        self.metric = metric
        self.dim: int = index.d
        self.threads = threads
        lists = faiss.try_extract_index_ivf(index)
        if lists is not None:
            lists.nprobe = min(nprobe or lists.nprobe, lists.nlist)
        self._lists = lists
        self._resources: Any = None  # of a GPU, if the index is on one; they must outlive it
        self.record = replace(
            record or IndexRecord("faiss", metric, self.dim, index.ntotal),
            nprobe=None if lists is None else lists.nprobe,
            faiss=record.faiss if record and record.faiss else faiss.__version__,
        )

    @property
    def store_fingerprint(self) -> str:
        """Of the store the index was built from, empty if unknown."""
        return self.record.store_fingerprint

    def __len__(self) -> int:
        return self._index.ntotal

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The k nearest keys that the index finds.

        Args:
            queries: ``(queries, dim)``, any floating dtype and device; searched as float32.
            k: neighbours; missing ones have score -inf and id -1 and come last.

        Raises:
            InputError: for k below 1 or queries of another width or non-finite.
        """
        check_k(k)
        wanted = prepare_queries(queries, self.dim, self.metric, torch.float32)
        with faiss_threads(self.threads):
            distances, ids = self._index.search(wanted.cpu().contiguous().numpy(), k)
        scores, ids = torch.from_numpy(distances), torch.from_numpy(ids)
        if self.metric == "l2":
            scores = (-scores).clamp_(max=0)
        missing = ids < 0
        scores.masked_fill_(missing, -torch.inf)
        ids.masked_fill_(missing, -1)
        scores, ids = ordered_topk(scores, k, ids)
        return SearchResult(scores.to(queries.device), ids.to(queries.device))

    def reconstruct(self, ids: Tensor) -> Tensor:
        """The keys as the index holds them: quantised, and of length one under "cosine".

        The first call on an index with inverted lists builds FAISS's direct map, 8 bytes per key.

        Args:
            ids: int64 of any shape, each an entry.

        Returns:
            float32, the shape of ``ids`` with ``dim`` appended.

        Raises:
            InputError: for ids outside the index, or an index type that cannot decode.
        """
        flat = ids.detach().cpu().reshape(-1).numpy().astype(np.int64)
        check(
            flat.size == 0 or (flat.min() >= 0 and flat.max() < len(self)),
            f"ids must lie between 0 and {len(self) - 1}, got {flat.min(initial=0)} to "
            f"{flat.max(initial=0)}; drop missing (-1) entries first",
        )
        if self._lists is not None and self._lists.direct_map.no():
            self._lists.make_direct_map()
        try:
            keys = self._index.reconstruct_batch(flat)
        except RuntimeError as error:
            raise InputError(
                f"the index {self.record.factory or type(self._index).__name__} cannot decode its "
                "keys; use the store's keys instead"
            ) from error
        return torch.from_numpy(keys).view(*ids.shape, self.dim).to(ids.device)

    def describe(self) -> dict[str, Any]:
        """Kind, factory, settings and measured recall (None: not measured)."""
        return self.record.summary()

    def save(self, directory: Path) -> None:
        """Write ``index.faiss`` and then ``index.json``, each whole or not at all."""
        directory = Path(directory)
        make_folder(directory)
        # Without its record a file is no index; so a crash between the two leaves none.
        remove(directory / RECORD_FILE)
        write_faiss(self._index, directory / FAISS_FILE)
        self.record.write(directory, directory / FAISS_FILE)

    def to_gpu(self, device: int = 0) -> "FaissIndex":
        """The same index on a GPU; what FAISS has no GPU version of (graphs, 4-bit codes) raises.

        Args:
            device: number of the GPU.

        Raises:
            MissingExtraError: if the FAISS that is installed has no GPU part.
            InputError: if FAISS cannot move this type of index, or there is no such GPU.
        """
        if not hasattr(faiss, "StandardGpuResources"):
            raise MissingExtraError(
                "an index on a GPU needs FAISS with its GPU part, but the one installed has none; "
                "install faiss-gpu instead of faiss-cpu, or search exactly with torch on the GPU"
            )
        try:
            resources = faiss.StandardGpuResources()  # pyright: ignore[reportAttributeAccessIssue]
            moved = faiss.index_cpu_to_gpu(resources, device, self._index)  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError as error:
            raise InputError(
                f"the index {self.record.factory or type(self._index).__name__} must be of a type "
                f"that FAISS has for GPUs, and GPU {device} must be there, but "
                f"{str(error).rpartition(': ')[2]}; leave it in memory"
            ) from error
        there = copy(self)
        there._index, there._resources = moved, resources
        return there

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        nprobe: int | None = None,
        threads: int | None = None,
        residency: str = "ram",
    ) -> "FaissIndex":
        """The index that ``save`` wrote.

        Args:
            directory: with ``index.json`` and the FAISS file.
            residency: "ram"; "disk": inverted lists stay on disk and are read as a search visits
                them (other types are read whole); "gpu": see `to_gpu`.
            nprobe: other than as built; the recall measured then no longer holds and is dropped.
            threads: of a search.

        Raises:
            CorruptStoreError: if the file is missing, altered, or not what the record says.
        """
        check_choice("residency", residency, RESIDENCIES)
        record = IndexRecord.read(directory)
        path = directory / record.file
        if not path.is_file():
            raise CorruptStoreError(f"{path} must exist but does not; build the index again")
        if (found := checksum(path)) != record.checksum:
            raise CorruptStoreError(
                f"{path} must have checksum {record.checksum} but has {found}; it was changed or "
                "damaged: build the index again"
            )
        if nprobe is not None and nprobe != record.nprobe:
            record = replace(record, recall=None)
        index = read_faiss(path, mapped=residency == "disk")
        if (index.ntotal, index.d) != (record.entries, record.dim):
            raise CorruptStoreError(
                f"{path} must hold {record.entries} keys of {record.dim} dimensions but holds "
                f"{index.ntotal} of {index.d}; build the index again"
            )
        loaded = cls(
            index, record.metric, nprobe=nprobe or record.nprobe, threads=threads, record=record
        )
        return loaded.to_gpu() if residency == "gpu" else loaded

    @classmethod
    def from_file(
        cls, path: Path, metric: str = "l2", *, nprobe: int | None = None, **known: Any
    ) -> "FaissIndex":
        """Wrap a FAISS file made elsewhere (the published indexes, for example).

        Args:
            path: written by ``faiss.write_index``.
            metric: as for the constructor.
            nprobe: as for the constructor.
            known: further fields of `IndexRecord`, e.g. ``store_fingerprint``.

        Raises:
            CorruptStoreError: if FAISS cannot read it.
            InputError: as the constructor.
        """
        index = read_faiss(path)
        record = IndexRecord("faiss", metric, index.d, index.ntotal, **known)
        return cls(index, metric, nprobe=nprobe, record=record)


@contextmanager
def faiss_threads(count: int | None) -> Iterator[int]:
    """Run the block with ``count`` OpenMP threads in FAISS (None: as they are), then restore.

    Raises:
        InputError: if ``count`` is below 1.
    """
    check(count is None or count >= 1, f"threads must be at least 1, got {count}")
    before = faiss.omp_get_max_threads()
    if count is not None:
        faiss.omp_set_num_threads(count)
    try:
        yield count or before
    finally:
        if faiss.omp_get_max_threads() != before:
            faiss.omp_set_num_threads(before)
