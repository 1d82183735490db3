"""Stores made of stores: some entries of one, or several one after the other.

    compact     without the entries of deleted documents
    prune       the survivors of a merge, each with its weight and with who follows it
    join        one store of several that were made alike

A store is never changed; a new one is written beside it, whole or not at all, with the habits of
every store (`memlm.store.writer`): interrupted, it is continued by the same call.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.core.files import fingerprint, link_or_copy
from memlm.store.arrays import save_arrays
from memlm.store.codec import CODEC, CODEC_RECORD
from memlm.store.deleted import delete_documents
from memlm.store.directory import make_directory
from memlm.store.entries import integers_hash
from memlm.store.manifest import PlannedRange
from memlm.store.reader import Datastore
from memlm.store.writer import StoreWriter


class _Rows:
    """Keys of some entries of a store, read when they are asked for."""

    ndim = 2

    def __init__(self, store: Datastore, entries: Tensor):
        self.store, self.entries = store, entries
        self.shape = (len(entries), store.dim)
        self.dtype = store.dtype

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.store.gather(self.entries[rows])


def compact_store(store: Datastore, out: str | Path) -> Datastore:
    """A store without the entries of deleted documents; the other documents keep their numbers.

    Args:
        store: with deleted documents.
        out: a new or empty directory.

    Raises:
        InputError: if nothing is deleted.
        StoreError: if the directory cannot be written or is not empty.
    """
    dead = store.dead
    check(
        dead is not None and bool(dead.any()),
        f"{store.path} must have deleted documents to be compacted, but it has none",
    )
    kept = torch.ones(len(store), dtype=torch.bool) if dead is None else ~dead
    if store.weights is None:
        return _write(store, kept.nonzero().squeeze(-1), out)
    return _write(
        store,
        kept.nonzero().squeeze(-1),
        out,
        weights=store.weights,
        successors=store.successors.masked_fill(~kept[store.successors.long()], -1),
    )


def prune(store: Datastore, parent: Tensor, weights: Tensor, out: str | Path) -> Datastore:
    """The survivors of a merge as a store, with their weights and mapped successors.

    An entry's successor is the one that stands for the entry that followed it in the full store.

    Args:
        store: full.
        parent: ``(entries,)`` int64, the entry that absorbed each; survivors are their own.
        weights: ``(entries,)`` integers, entries that each stands for; 0 where it was absorbed.
        out: a new or empty directory.

    Raises:
        InputError: if the store is pruned already or has deleted documents, or the merge is not one
            of this store.
        StoreError: if the directory cannot be written or is not empty.
    """
    count = len(store)
    check(
        store.weights is None and store.dead is None,
        f"{store.path} must be a full store without deleted documents to be pruned; compact it "
        "first, or prune the store it was pruned from",
    )
    check(
        parent.shape == weights.shape == (count,)
        and int(weights.sum()) == count
        and bool((weights[parent] > 0).all()),
        f"the merge must account for the store's {count} entries, got {len(parent)} of total "
        f"weight {int(weights.sum())}; merge this store",
    )
    following = store.successors.long()
    heirs = torch.where(following >= 0, parent[following.clamp(min=0)], -1)
    return _write(store, weights.nonzero().squeeze(-1), out, weights=weights, successors=heirs)


def join_stores(stores: Sequence[Datastore], out: str | Path) -> Datastore:
    """One store of several: their entries one after the other, their documents renumbered alike.

    Keys and values are not copied: their files get a second name in the new directory (a hard
    link), or are copied where a file system cannot do that. Any of the stores may be removed.

    What was deleted stays deleted. Indexes and clusters are not joined; an index of the first store
    is carried on by `memlm.index.build.extend_index`.

    Args:
        stores: at least two, made with the same model, tokenizer, tap, number format and metric;
            all with documents or none, none of them pruned.
        out: a new or empty directory.

    Raises:
        InputError: for fewer than two stores, or a pruned one.
        FingerprintError: if they were not made alike, naming what differs.
        StoreError: if the directory cannot be written or is not empty.
    """
    check(len(stores) >= 2, f"at least two stores must be given to join, got {len(stores)}")
    for store in stores:
        check(
            store.weights is None,
            f"{store.path} must be a full store to be joined, but it is pruned; join the stores "
            "first and prune the whole",
        )
        _check_alike(stores[0], store)
    documents = [store.documents for store in stores]
    first = [0]  # number of the first document of each store
    for store, numbers in zip(stores, documents, strict=True):
        here = 0 if numbers is None else int(numbers.max()) + 1
        first.append(first[-1] + max(here, store.manifest.info.documents or 0))
    joined = _adopt_all(stores, documents, first, Path(out))
    deleted = [
        start + number
        for store, start in zip(stores, first, strict=False)
        for number in store.deleted
    ]
    return delete_documents(joined, deleted) if deleted else joined


def _adopt_all(
    stores: Sequence[Datastore],
    documents: Sequence[Tensor | None],
    first: Sequence[int],
    out: Path,
) -> Datastore:
    """A store of the very files of others, shard by shard."""
    identity, info = stores[0].manifest.identity, stores[0].manifest.info
    make_directory(out)
    if identity.codec is not None:
        for name in (CODEC, CODEC_RECORD):
            link_or_copy(stores[0].path / name, out / name)
    shards, ranges = [], []
    for place, store in enumerate(stores):
        row = 0
        for shard, record in enumerate(store.manifest.shards):
            shards.append((place, shard, slice(row, row + record.rows)))
            ranges.append(PlannedRange(len(ranges), len(ranges) + 1, record.rows))
            row += record.rows
    values = torch.cat([store.values for store in stores])
    writer = StoreWriter.open(
        out,
        replace(
            identity,
            corpus_hash=fingerprint(
                [integers_hash(values), *(store.fingerprint for store in stores)]
            ),
            windows={},
            batch_tokens=0,
            threads=None,
        ),
        ranges,
        info=replace(
            info,
            documents=None,
            corpus={"joined": [dict(store.manifest.info.corpus) for store in stores]},
        ),
    )
    while pending := writer.pending():
        for number in pending:
            with writer.claim(number) as mine:
                if mine:
                    place, shard, rows = shards[number]
                    column = documents[place]
                    moved = column is not None and first[place] > 0
                    own = column[rows] + first[place] if moved and column is not None else None
                    writer.adopt(number, stores[place], shard, own)
    return writer.finalize()


def _check_alike(one: Datastore, other: Datastore) -> None:
    """Raise FingerprintError unless the keys of two stores may stand in one."""
    mine, theirs = (
        {**_origin(store), "places": store.manifest.info.places} for store in (one, other)
    )
    mine |= {"dim": one.dim, "codec": one.manifest.identity.codec}
    theirs |= {"dim": other.dim, "codec": other.manifest.identity.codec}
    differences = [
        f"{name} is {mine[name]!r} in {one.path} and {theirs[name]!r} in {other.path}"
        for name in mine
        if name != "model" and mine[name] != theirs[name]
    ]
    if differences:
        raise FingerprintError(
            f"stores must be made alike to be joined, but {'; '.join(differences)}; extract them "
            "with the same model and settings"
        )


def _origin(store: Datastore) -> dict[str, Any]:
    """What the keys of a store are, as `save_arrays` takes it."""
    identity = store.manifest.identity
    return {
        "model": identity.model,
        "model_hash": identity.model_hash,
        "tokenizer_hash": identity.tokenizer_hash,
        "tap": identity.tap,
        "dtype": identity.dtype,
        "metric": store.metric,
    }


def _write(
    store: Datastore,
    entries: Tensor,
    out: str | Path,
    *,
    weights: Tensor | None = None,
    successors: Tensor | None = None,
) -> Datastore:
    """Some entries of a store; weights and successors come for all, by old number."""
    check(
        store.codec is None,
        f"{store.path} is a store of codes, whose entries cannot be written into another one; "
        "build it again without the documents, or go on with the deleted ones hidden",
    )
    if successors is not None:
        number = torch.full((len(store),), -1)
        number[entries] = torch.arange(len(entries))
        following = successors[entries].long()
        successors = number[following.clamp(min=0)].masked_fill(following < 0, -1)
    info, documents, positions = store.manifest.info, store.documents, store.positions
    return save_arrays(
        out,
        _Rows(store, entries),  # type: ignore[arg-type]
        store.values[entries],
        documents=None if documents is None else documents[entries],
        positions=None if positions is None else positions[entries],
        weights=None if weights is None else weights[entries],
        successors=successors,
        **_origin(store),
        vocab_size=info.vocab_size,
        corpus=dict(info.corpus),
    )
