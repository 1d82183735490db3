"""``memlm delete``, ``compact``, ``prune`` and ``join``: stores made of stores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from memlm.cli.options import show

if TYPE_CHECKING:
    from memlm.store.reader import Datastore


@dataclass(frozen=True, kw_only=True)
class Delete:
    """Hide documents of a datastore from every search, at once. Indexes and clusters stay valid."""

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    documents: Annotated[tuple[int, ...], Positional, arg(metavar="DOCUMENT")]
    """Numbers of documents, in the order of the text they came from, from 0."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Delete."""
        from memlm.core.config import check
        from memlm.store.deleted import delete_documents
        from memlm.store.reader import Datastore

        check(len(self.documents) > 0, "name the numbers of the documents to delete, got none")
        store = delete_documents(Datastore.open(self.store), self.documents)
        dead = 0 if store.dead is None else int(store.dead.sum())
        text = (
            f"{store.path}: {len(store.deleted):,} documents deleted, {dead:,} of {len(store):,} "
            f"entries\nnext: memlm compact {store.path} --out SMALLER"
        )
        value = {"documents": list(store.deleted), "dead": dead, "entries": len(store)}
        show(value, text, as_json=self.json)
        return 0


@dataclass(frozen=True, kw_only=True)
class Compact:
    """Write a datastore without its deleted documents. Interrupted, it continues when run again."""

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore."""
    out: str
    """Directory of the new one."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Rewrite."""
        from memlm.store.reader import Datastore
        from memlm.store.rewrite import compact_store

        return _made(compact_store(Datastore.open(self.store), self.out), as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Merge entries that say the same in the same place (He et al. 2021, section 4.3).

    Every entry absorbs those of its nearest neighbours that have its value; the survivors, with
    weights, are a smaller datastore.
    """

    store: Annotated[str, Positional, arg(metavar="STORE")]
    """Directory of the datastore; the index saved with it is searched, else every key."""
    out: str
    """Directory of the new one."""
    neighbours: int = 9
    """Nearest entries that each may absorb."""
    seed: int = 1
    """Of the order in which entries are visited."""
    threads: int | None = None
    """CPU threads (default: as torch and FAISS choose)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Search, merge, write."""
        from memlm.methods.pruning import prune_store
        from memlm.store.reader import Datastore

        made = prune_store(
            Datastore.open(self.store),
            self.out,
            neighbours=self.neighbours,
            seed=self.seed,
            threads=self.threads,
        )
        return _made(made, as_json=self.json)


@dataclass(frozen=True, kw_only=True)
class Join:
    """Write one datastore of several, made alike: the way to add documents to one.

    If the first has an approximate index, the new one gets it too, with the new keys added.
    """

    stores: Annotated[tuple[str, ...], Positional, arg(metavar="STORE")]
    """Directories of the datastores, at least two."""
    out: str
    """Directory of the new one."""
    threads: int | None = None
    """CPU threads (default: as FAISS chooses)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> int:
        """Join, and carry the index on."""
        from memlm.index.build import extend_index, has_index
        from memlm.memory.knn import INDEX_DIRECTORY
        from memlm.store.reader import Datastore
        from memlm.store.rewrite import join_stores

        stores = [Datastore.open(store) for store in self.stores]
        made = join_stores(stores, self.out)
        if has_index(stores[0].path / INDEX_DIRECTORY):
            extend_index(
                stores[0].path / INDEX_DIRECTORY,
                made,
                made.path / INDEX_DIRECTORY,
                threads=self.threads,
            )
        return _made(made, as_json=self.json)


def _made(store: "Datastore", *, as_json: bool) -> int:
    size = sum(sum(shard.sizes.values()) for shard in store.manifest.shards)
    text = f"{store.path}: {len(store):,} entries of {store.dim} dimensions, {size / 1e6:,.1f} MB"
    show({**store.describe(), "bytes": size}, text, as_json=as_json)
    return 0
