"""Build an index: plan, sample, train, add, measure, save; after a kill, continue.

Training keys are a seeded sample without replacement, read in order (Johnson et al. 2017 train on
a sample; kNN-LM uses a million). Keys are then added block by block. With a directory, the
trained and partly filled index is kept beside the final name, so a build that dies goes on from
the last saved block and ends with the same bytes.

Differs from the papers' code: the sample is drawn by NumPy's current generator and sorted, so the
centroids are not those of the original files.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError
from memlm.core.faiss_files import read_faiss, write_faiss
from memlm.core.files import (
    fingerprint,
    make_folder,
    read_json,
    remove,
    remove_temporaries,
    write_json,
)
from memlm.core.progress import bar
from memlm.core.types import Index
from memlm.index.exact import ExactIndex
from memlm.index.keys import KeySource, as_keys, load_if_it_fits, sample_keys
from memlm.index.metrics import prepare_keys
from memlm.index.plan import IndexConfig, IndexPlan, plan_index
from memlm.index.recall import finds_itself, measure_recall
from memlm.index.record import RECORD_FILE, IndexRecord

BUILDING_FILE = "building.faiss"
BUILDING_RECORD = "building.json"
_BLOCK_ROWS = 65_536
# Keys between two saves of an unfinished index.
_SAVE_EVERY = 10_000_000


def build_index(
    keys: Tensor | KeySource,
    config: IndexConfig | None = None,
    *,
    directory: Path | None = None,
    store_fingerprint: str | None = None,
    queries: Tensor | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> Index:
    """Index all keys.

    Args:
        keys: a datastore, another source of keys, or a tensor ``(entries, dim)``.
        config: what to build; None: the defaults.
        directory: where to save it and to continue an interrupted build; None: in memory only.
        store_fingerprint: None: ``keys.fingerprint`` if there is one.
        queries: ``(queries, dim)`` to measure the recall with; None: held keys.
        threads: OpenMP threads of FAISS; None: as they are.
        quiet: show no progress bar.

    Returns:
        An exact or a FAISS index. Departures from the config warn with a UserWarning.

    Raises:
        InputError: for no keys, an unknown factory, or zero keys under "cosine".
        StoreError: if the directory cannot be written.
    """
    config = config or IndexConfig()
    source = as_keys(keys)
    if store_fingerprint is None:
        store_fingerprint = str(getattr(keys, "fingerprint", ""))
    plan = plan_index(len(source), source.dim, config)
    for message in plan.warnings:
        warnings.warn(message, UserWarning, stacklevel=2)
    if plan.engine == "exact":
        exact = ExactIndex(
            load_if_it_fits(keys), config.metric, store_fingerprint=store_fingerprint
        )
        if directory is not None:
            exact.save(Path(directory))
        return exact

    from memlm.index.faiss_index import FaissIndex, faiss_threads

    with faiss_threads(threads):
        raw = _Build(source, config, plan, directory, store_fingerprint, quiet).run()
        record = IndexRecord(
            engine="faiss",
            metric=config.metric,
            dim=source.dim,
            entries=len(source),
            store_fingerprint=store_fingerprint,
            factory=plan.factory,
            train_size=plan.train_size,
            seed=config.seed,
        )
        index = FaissIndex(raw, config.metric, nprobe=config.nprobe, threads=threads, record=record)
        if config.recall_queries:
            recall = measure_recall(
                index,
                keys,
                config.recall_k,
                queries=queries,
                count=config.recall_queries,
                seed=config.seed,
            )
            index.record = replace(index.record, recall=recall.to_dict())
    if directory is not None:
        index.save(Path(directory))
        for name in (BUILDING_FILE, BUILDING_RECORD):
            remove(Path(directory) / name)
    return index


def extend_index(
    source: Path,
    keys: KeySource,
    directory: Path,
    *,
    threads: int | None = None,
    quiet: bool = False,
) -> Index:
    """Carry an index on: to the keys it holds, those that a longer store has behind them are added.

    Nothing is trained again, so the recall that was measured before is dropped: measure it anew if
    much was added.

    Args:
        source: directory of the index of a store.
        keys: of a store that begins with the same keys (`memlm.store.rewrite.join_stores`).
        directory: where to save the longer index.
        threads: OpenMP threads of FAISS; None: as they are.
        quiet: show no progress bar.

    Raises:
        InputError: if there are fewer keys than the index holds, or they are of another width.
        CorruptStoreError: if the index is damaged.
    """
    store_fingerprint = str(getattr(keys, "fingerprint", ""))
    record = IndexRecord.read(Path(source))
    check(
        keys.dim == record.dim and len(keys) >= record.entries,
        f"the keys must go on where the index of {record.entries:,} keys of {record.dim} "
        f"dimensions ends, got {len(keys):,} keys of {keys.dim}; join the stores in this order",
    )
    if record.engine == "exact":
        exact = ExactIndex(
            load_if_it_fits(keys), record.metric, store_fingerprint=store_fingerprint
        )
        exact.save(Path(directory))
        return exact

    from memlm.index.faiss_index import FaissIndex, faiss_threads

    index = FaissIndex.load(Path(source), threads=threads)
    raw = index._index
    with (
        faiss_threads(threads),
        bar(len(keys), label="index", unit="key", initial=raw.ntotal, quiet=quiet) as progress,
    ):
        for start, block in keys.blocks(_BLOCK_ROWS):
            new = block[max(0, raw.ntotal - start) :]
            if len(new):
                add_keys(raw, new, record.metric)
                progress.update(len(new))
    index.record = replace(
        record, entries=len(keys), store_fingerprint=store_fingerprint, recall=None
    )
    index.save(Path(directory))
    return index


def load_index(
    directory: Path,
    keys: Tensor | KeySource | None = None,
    *,
    store_fingerprint: str | None = None,
    nprobe: int | None = None,
    threads: int | None = None,
    residency: str = "ram",
) -> Index:
    """The index saved in ``directory``.

    Args:
        directory: with ``index.json``.
        keys: of the store; exact search needs them, others only compare sizes.
        store_fingerprint: of the store in use; None: ``keys.fingerprint`` if there is one.
        nprobe: lists to visit, if other than as built; the measured recall is dropped then.
        threads: OpenMP threads of a search.
        residency: of a FAISS index: "ram", "disk" or "gpu" (`FaissIndex.load`).

    Raises:
        FingerprintError: if the index was built from another store.
        CorruptStoreError: if a file is missing or was changed, or the sizes differ.
        InputError: if an exact index is loaded without keys.
    """
    directory = Path(directory)
    record = IndexRecord.read(directory)
    if store_fingerprint is None:
        store_fingerprint = str(getattr(keys, "fingerprint", ""))
    record.check_store(store_fingerprint)
    if keys is not None:
        source = as_keys(keys)
        if (len(source), source.dim) != (record.entries, record.dim):
            raise CorruptStoreError(
                f"the index in {directory} must hold the store's {len(source)} keys of "
                f"{source.dim} dimensions but holds {record.entries} of {record.dim}; build it "
                "again"
            )
    if record.engine == "exact":
        if keys is None:
            raise InputError(
                f"the index in {directory} is exact search over the store's keys, which were not "
                "given; pass keys=store"
            )
        keys = load_if_it_fits(keys)
        return ExactIndex(keys, record.metric, store_fingerprint=record.store_fingerprint)

    from memlm.index.faiss_index import FaissIndex

    index = FaissIndex.load(directory, nprobe=nprobe, threads=threads, residency=residency)
    if keys is not None:
        check_own(index, as_keys(keys), directory)
    return index


def check_own(index: Index, keys: KeySource, path: Path) -> None:
    """Warn if keys do not find themselves: an index without a fingerprint may be of any store.

    Args:
        index: of as many keys.
        keys: that it should be of.
        path: of the index, for the message.
    """
    if not finds_itself(index, keys):
        warnings.warn(
            f"keys of the store should find themselves with the index in {path}, but most do not; "
            "it may be of another store, or far too coarse: build it again",
            UserWarning,
            stacklevel=3,
        )


def has_index(directory: Path) -> bool:
    """Whether a finished index is saved in ``directory``."""
    return (Path(directory) / RECORD_FILE).is_file()


class _Build:
    """One FAISS index from nothing, or from where the last attempt stopped, to full."""

    def __init__(
        self,
        keys: KeySource,
        config: IndexConfig,
        plan: IndexPlan,
        directory: Path | None,
        store_fingerprint: str,
        quiet: bool,
    ):
        import faiss

        self.keys, self.config, self.plan, self.quiet = keys, config, plan, quiet
        self.directory = None if directory is None else Path(directory)
        self.identity = fingerprint(
            {
                "config": config.to_dict(),
                "factory": plan.factory,
                "keys": [len(keys), keys.dim, store_fingerprint],
                "faiss": faiss.__version__,
            }
        )

    def run(self) -> Any:
        """The filled FAISS index."""
        index = self._resume()
        if index is None:
            index = self._train()
            self._keep(index)
        done = saved = index.ntotal
        with bar(
            len(self.keys), label="index", unit="key", initial=done, quiet=self.quiet
        ) as progress:
            for start, block in self.keys.blocks(_BLOCK_ROWS):
                if start < done:
                    continue
                add_keys(index, block, self.config.metric)
                progress.update(len(block))
                if index.ntotal - saved >= _SAVE_EVERY:
                    saved = index.ntotal
                    self._keep(index)
        check(
            index.ntotal == len(self.keys),
            f"the source of keys must yield all {len(self.keys)} keys, got {index.ntotal}",
        )
        return index

    def _train(self) -> Any:
        metric, seed = self.config.metric, self.config.seed
        sample = partial(sample_keys, self.keys, self.plan.train_size, metric, seed)
        return train_faiss(self.keys.dim, self.plan.factory, metric, sample, seed)

    def _resume(self) -> Any | None:
        """The unfinished index of an earlier attempt at the very same build, or None."""
        if self.directory is None:
            return None
        make_folder(self.directory)
        record, file = self.directory / BUILDING_RECORD, self.directory / BUILDING_FILE
        remove_temporaries(self.directory)
        try:
            same = read_json(record)["identity"] == self.identity
        except (CorruptStoreError, KeyError):
            same = False
        if same and file.exists():
            return read_faiss(file)
        remove(file)
        write_json(record, {"identity": self.identity})
        return None

    def _keep(self, index: Any) -> None:
        if self.directory is not None:
            write_faiss(index, self.directory / BUILDING_FILE)


def train_faiss(
    dim: int, factory: str, metric: str, sample: Callable[[], NDArray[np.float32]], seed: int
) -> Any:
    """A FAISS index without keys, trained if its type needs it.

    Args:
        dim: width of a key.
        factory: FAISS factory string.
        metric: "l2", "ip" or "cosine".
        sample: makes keys ``(rows, dim)`` to train on, of length one for "cosine".
        seed: of the clusterings.
    """
    import faiss

    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.index_factory(dim, factory, measure)
    _seed(index, seed)
    if not index.is_trained:
        index.train(sample())
    return index


def index_of_codes(
    codec: Path,
    record: IndexRecord,
    codes: Iterable[tuple[int, Tensor]],
    *,
    nprobe: int | None = None,
    threads: int | None = None,
) -> Index:
    """The index of a store of codes, put together in memory: no key is coded or trained again.

    Args:
        codec: file of the trained index.
        record: what it is, with the entries and the fingerprint of the store.
        codes: blocks of them in order, with the number of the first entry.
        nprobe: lists to visit; None: as the record says.
        threads: OpenMP threads of a search.

    Raises:
        CorruptStoreError: if the codec cannot be read.
    """
    import faiss

    from memlm.index.faiss_index import FaissIndex

    index = read_faiss(codec)
    # Codes are those of rotated keys, so they go past whatever rotates.
    inner = faiss.try_extract_index_ivf(index) or faiss.downcast_index(index)
    for start, block in codes:
        ids = np.arange(start, start + len(block))
        inner.add_sa_codes(np.ascontiguousarray(block.numpy()), ids)
    index.ntotal = inner.ntotal
    return FaissIndex(
        index, record.metric, nprobe=nprobe or record.nprobe, threads=threads, record=record
    )


def add_keys(index: Any, keys: Tensor, metric: str) -> None:
    """Add keys ``(rows, dim)`` to a FAISS index, numbered on from those it holds."""
    start = index.ntotal
    block = prepare_keys(keys, metric, start).cpu().contiguous().numpy()
    if hasattr(index, "id_map"):  # FAISS wants ids spelled out there
        index.add_with_ids(block, np.arange(start, start + len(block)))
    else:
        index.add(block)


def _seed(index: Any, seed: int) -> None:
    """Seed the clusterings of an index, whatever wraps it, and leave out polysemous training.

    Factory strings turn that on; it serves a search mode that is never used here, takes most of
    the training time, and the papers' code does not do it.
    """
    import faiss

    index = faiss.downcast_index(index)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.cp.seed = seed
        index = faiss.downcast_index(lists)
    if hasattr(index, "pq"):
        index.pq.cp.seed = seed
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False
