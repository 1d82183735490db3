"""Datastores of the published programs become stores of ours, and the other way.

An import copies keys and values into a new store; a FAISS index and clusters that belong to it come
along, checked against its size. What a program did not write down (model, tokenizer, documents)
stays unknown, and so is not compared later.

Differs from the programs: rows that were never filled (zero keys and values at the end) are left
out with a warning; there they are indexed and found.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlm.core.config import check
from memlm.core.files import write_atomic
from memlm.formats.members import read_members
from memlm.formats.memmaps import Arrays, read_arrays, unwritten
from memlm.index.build import check_own
from memlm.index.partition import AUTOMATON_DIRECTORY, Clusters
from memlm.memory.knn import INDEX_DIRECTORY
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore

_BLOCK = 1 << 16


def import_datastore(
    path: str | Path,
    out: str | Path,
    *,
    index: str | Path | None = None,
    members: str | Path | None = None,
    entries: int | None = None,
    dim: int | None = None,
    dtype: str | None = None,
    metric: str = "l2",
    **known: Any,
) -> Datastore:
    """Make a store of the raw files of kNN-LM, RetoMaton, efficient-knnlm or TRIME.

    Args:
        path: the file of keys, what comes before ``_keys.npy``, or a directory with one pair.
        out: a new or empty directory; interrupted, the same call continues.
        index: FAISS file of the same keys; saved beside the store with its own settings.
        members: pickled clusters of the same entries; saved beside the store.
        entries: rows, where names and sizes do not say it.
        dim: width of a key, likewise; None: that of ``index``, if given.
        dtype: ``"float16"`` or ``"float32"``, likewise.
        metric: how the keys are meant to be compared.
        known: ``model``, ``tap``, ``vocab_size`` and others that `save_arrays` takes.

    Raises:
        InputError: if sizes do not fit, or index or clusters are of another size.
        CorruptStoreError: if a file is damaged.
        StoreError: if the directory cannot be written or holds something else.
    """
    from memlm.index.faiss_index import FaissIndex

    found = None if index is None else FaissIndex.from_file(Path(index), metric)
    if found is not None:
        dim, entries = dim or found.dim, entries or len(found)
    arrays = _filled(read_arrays(path, entries=entries, dim=dim, dtype=dtype))
    store = save_arrays(
        out,
        arrays.keys,
        arrays.values,
        weights=arrays.weights,
        # a merged store of the published program has forgotten what follows what
        successors=None if arrays.weights is None else np.full(len(arrays.values), -1),
        metric=metric,
        **known,
    )
    if found is not None:
        check(
            (len(found), found.dim) == (len(store), store.dim),
            f"the index must be of the store's {len(store):,} keys of {store.dim} dimensions, got "
            f"{len(found):,} of {found.dim}; give the index that was built of these keys",
        )
        check_own(found, store, Path(str(index)))
        found.record = replace(found.record, store_fingerprint=store.fingerprint)
        found.save(store.path / INDEX_DIRECTORY)
    if members is not None:
        read = read_members(members)
        Clusters.from_members(
            read.offsets, read.members, len(store), store_fingerprint=store.fingerprint
        ).save(store.path / AUTOMATON_DIRECTORY)
    return store


def export_datastore(store: Datastore, prefix: str | Path, *, value_bytes: int = 8) -> None:
    """Write ``PREFIX_keys.npy`` and ``PREFIX_vals.npy`` as the published programs read them.

    Args:
        store: keys of bfloat16, which those programs do not know, become float32.
        prefix: what comes before ``_keys.npy``.
        value_bytes: 8 for kNN-LM, RetoMaton and TRIME (int64), 4 for knn-transformers (int32).
    """
    check(value_bytes in (4, 8), f"value_bytes must be 4 or 8, got {value_bytes}")
    prefix = Path(prefix)
    as_type = torch.float32 if store.dtype == torch.bfloat16 else store.dtype

    def write_keys(file):
        for _, block in store.blocks(_BLOCK):
            file.write(block.to(as_type).contiguous().numpy().tobytes())

    values = store.values.numpy().astype(f"<i{value_bytes}")
    write_atomic(prefix.with_name(f"{prefix.name}_keys.npy"), write_keys)
    write_atomic(
        prefix.with_name(f"{prefix.name}_vals.npy"), lambda file: file.write(values.tobytes())
    )


def _filled(arrays: Arrays) -> Arrays:
    """Without the rows at the end that nobody filled."""
    entries = len(arrays.values)
    missing = unwritten(arrays)
    check(missing < entries, f"the store must hold entries, but all {entries:,} are zero")
    if missing == 0:
        return arrays
    warnings.warn(
        f"the last {missing:,} of {entries:,} entries were never written (zero keys and values) "
        "and are left out; an index or clusters of all of them will not fit",
        UserWarning,
        stacklevel=3,
    )
    keys, values, weights = (None if part is None else part[: entries - missing] for part in arrays)
    return Arrays(keys, values, weights)  # type: ignore[arg-type]
