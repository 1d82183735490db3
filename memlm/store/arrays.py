"""Entries that are already in arrays become a datastore: importers, rewritten stores and tests."""

import time
from pathlib import Path
from typing import Any

import torch

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.store.entries import Column, in_memory, integers_hash
from memlm.store.manifest import Identity, PlannedRange, StoreInfo
from memlm.store.reader import Datastore
from memlm.store.writer import StoreWriter

_POLL_SECONDS = 0.2
_COMPARED = 512  # keys at either end


def save_arrays(
    path: str | Path,
    keys: Column,
    values: Column,
    *,
    documents: Column | None = None,
    positions: Column | None = None,
    weights: Column | None = None,
    successors: Column | None = None,
    model: str = "unknown",
    model_hash: str | None = None,
    tokenizer_hash: str | None = None,
    tap: str = "unknown",
    corpus_hash: str | None = None,
    dtype: str | None = None,
    metric: str = "l2",
    vocab_size: int | None = None,
    corpus: dict[str, Any] | None = None,
    shard_rows: int = 1 << 20,
) -> Datastore:
    """Write entries that are already there as a datastore.

    Interrupted, it continues where it was when called again with the same arrays; a complete store
    of them is opened as it is.

    Args:
        path: a new or empty directory.
        keys: ``(entries, dim)`` floating point; may be a memory map, read a shard at a time.
        values: ``(entries,)`` integers, the token that followed each key.
        documents: ``(entries,)`` integers or None; together with ``positions`` or not at all.
        positions: ``(entries,)`` integers or None.
        weights: ``(entries,)`` integers or None; together with ``successors`` or not at all.
        successors: ``(entries,)`` integers or None.
        model: name for people.
        model_hash: of the model that made the keys, None if unknown (then it cannot be checked).
        tokenizer_hash: of its tokenizer, None if unknown.
        tap: which tensor the keys are.
        corpus_hash: of the text; None: that of the values, which stand for it.
        dtype: number format on disk; None: that of ``keys``.
        metric: how the keys are meant to be compared.
        vocab_size: values must be below it; None: not checked.
        corpus: informative description of the text.
        shard_rows: entries per shard.

    Raises:
        InputError: if the arrays do not fit together or hold what a store refuses.
        StoreError: if the directory holds other files.
        FingerprintError: if the directory holds another store, or the beginning of one.
    """
    check(
        keys.ndim == 2 and keys.shape[0] >= 1 and keys.shape[1] >= 1,
        f"keys must have shape (entries, dim) with at least one entry, got {tuple(keys.shape)}",
    )
    for pair, columns in (
        ("documents and positions", (documents, positions)),
        ("weights and successors", (weights, successors)),
    ):
        check(
            (columns[0] is None) == (columns[1] is None),
            f"{pair} must be given together or not at all, got one of them",
        )
    check(shard_rows >= 1, f"shard_rows must be at least 1, got {shard_rows}")
    count, dim = keys.shape
    columns = {
        "values": values,
        "documents": documents,
        "positions": positions,
        "weights": weights,
        "successors": successors,
    }
    for label, column in columns.items():
        check(
            column is None or tuple(column.shape) == (count,),
            f"{label} must have shape ({count},) like the keys, "
            f"got {None if column is None else tuple(column.shape)}",
        )
    identity = Identity(
        model=model,
        model_hash=model_hash,
        tokenizer_hash=tokenizer_hash,
        tap=tap,
        dim=dim,
        dtype=dtype or str(keys.dtype).removeprefix("torch."),
        corpus_hash=corpus_hash or integers_hash(values),
    )
    info = StoreInfo(
        metric=metric,
        places=documents is not None,
        merged=weights is not None,
        vocab_size=vocab_size,
        corpus=corpus or {},
    )
    ranges = [
        PlannedRange(at, min(at + shard_rows, count), min(shard_rows, count - at))
        for at in range(0, count, shard_rows)
    ]
    writer = StoreWriter.open(path, identity, ranges, info=info)
    if writer.complete:
        store = Datastore.open(writer.path)
        _check_same_keys(store, keys)
        return store
    while pending := writer.pending():
        worked = False
        for number in pending:
            with writer.claim(number) as mine:
                if not mine:
                    continue
                worked = True
                part = slice(ranges[number].first_window, ranges[number].last_window)
                writer.write(
                    number,
                    in_memory(keys[part]),
                    **{
                        name: in_memory(column[part])
                        for name, column in columns.items()
                        if column is not None
                    },
                )
        if not worked:
            time.sleep(_POLL_SECONDS)  # another process does the rest
    return writer.finalize()


def _check_same_keys(store: Datastore, keys: Column) -> None:
    """Refuse other keys than a complete store has; the first and the last are compared."""
    for part in (slice(0, _COMPARED), slice(max(0, len(store) - _COMPARED), len(store))):
        given = in_memory(keys[part])
        entries = torch.arange(part.start, part.start + len(given))
        if not torch.equal(given.cpu().to(store.dtype), store.gather(entries)):
            raise FingerprintError(
                f"{store.path} holds a complete datastore of other keys; open it, or choose "
                "another directory"
            )
