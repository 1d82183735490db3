"""Deleted documents: a list beside the store; nothing is rewritten and no index built anew.

``deleted.json`` names the documents that nobody may find any more. The entries stay where they are,
so indexes and clusters of the store go on being valid; whoever reads the store leaves dead entries
out of what it finds (`Datastore.dead`). `memlm.store.rewrite.compact_store` writes one without
them.

The store's fingerprint does not change, that of what a memory says does: `KnnMemory.describe`
counts the dead.
"""

from collections.abc import Iterable

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.files import write_json
from memlm.store.directory import locked, not_writable
from memlm.store.reader import DELETED, Datastore, read_deleted

_FORMAT_VERSION = 1


def delete_documents(store: Datastore, documents: Iterable[int]) -> Datastore:
    """Hide all entries of some documents, for good.

    Several processes may delete at once; what others deleted stays deleted.

    Args:
        store: with documents.
        documents: their numbers; one that is deleted already may be named again.

    Returns:
        The store, opened anew. Memories made of it before go on finding the entries.

    Raises:
        InputError: if the store does not know documents, has no such one, or none would be left.
        StoreError: if the directory cannot be written.
    """
    known = store.documents
    if known is None:
        raise InputError(
            f"{store.path} must know the document of every entry to delete some, but it was made "
            "without documents; build it from documents, or import them with it"
        )
    there = set(known.unique().tolist())
    wanted = {int(document) for document in documents}
    missing = sorted(wanted - there)
    check(
        not missing,
        f"documents to delete must be in the store, but {missing[:5]} are not; it has "
        f"{len(there)} documents, numbered from {min(there)} to {max(there)}",
    )
    try:
        with locked(store.path):
            gone = wanted | set(read_deleted(store.path))
            check(
                gone < there,
                f"at least one of the store's {len(there)} documents must be left, but all would "
                "be deleted; remove the directory instead",
            )
            write_json(
                store.path / DELETED,
                {"format_version": _FORMAT_VERSION, "documents": sorted(gone)},
            )
    except OSError as error:
        raise not_writable(store.path, error) from error
    return Datastore.open(store.path)
