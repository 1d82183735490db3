"""The index of a database's embeddings: built beside them, opened, carried on.

Documents that are appended leave every old embedding as it is, so the index that is there takes the
new ones in behind its own: nothing is trained again, and how much it finds is measured anew only
when it is built anew. The longer index is written into a folder of its own and then takes the place
of the other; killed anywhere, the same call goes on.

    index/index.json, index.faiss      see `memlm.index.record`
    index/longer/                      only while the index is carried on
"""

import os
import shutil
from pathlib import Path

from memlm.core.errors import StoreError
from memlm.core.files import make_folder, remove, sync_directory
from memlm.core.types import Index
from memlm.index.build import build_index, extend_index, has_index, load_index
from memlm.index.plan import IndexConfig
from memlm.index.record import FAISS_FILE, RECORD_FILE, IndexRecord
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.embeddings import DIRECTORY, Embeddings
from memlm.store.directory import not_writable, waiting

INDEX = "index"
_LONGER = "longer"


def index_chunks(
    database: ChunkDatabase,
    config: IndexConfig | None = None,
    path: str | Path | None = None,
    *,
    rebuild: bool = False,
    quiet: bool = False,
) -> Index:
    """Index the embeddings of a database; an index that is there is opened, or carried on.

    Args:
        database: whose embeddings.
        config: what to build, if there is nothing to open; None: the defaults.
        path: directory; None: ``index`` in that of the database.
        rebuild: forget what is there.
        quiet: show no progress bar.

    Raises:
        StoreError: if embeddings are missing, or the disk refuses.
        FingerprintError: if the index there is of other embeddings.
    """
    embeddings = Embeddings.open(database.path / DIRECTORY, database)
    path = database.path / INDEX if path is None else Path(path)
    make_folder(path)
    with waiting(path.parent, path.name):
        if rebuild:
            _forget(path)
        if not has_index(path) and not has_index(path / _LONGER):
            config = config or IndexConfig(recall_k=10)
            return build_index(embeddings, config, directory=path, quiet=quiet)
        _take_over(path)
        if _is_of_first(embeddings, IndexRecord.read(path)):
            extend_index(path, embeddings, path / _LONGER, quiet=quiet)
            _take_over(path)
        return load_index(path, embeddings)


def open_index(database: ChunkDatabase, embeddings: Embeddings) -> Index:
    """The index beside the embeddings of a database; exact search if there is none.

    Raises:
        StoreError: if documents were appended since it was made.
        FingerprintError: if it is of other embeddings.
    """
    path = database.path / INDEX
    if not has_index(path):
        return build_index(embeddings, IndexConfig(type="exact"), quiet=True)
    record = IndexRecord.read(path)
    if _is_of_first(embeddings, record):
        raise StoreError(
            f"{path} must hold all {len(embeddings):,} chunks, but documents were appended since "
            f"it was made of {record.entries:,}; run memlm retro index {database.path}"
        )
    return load_index(path, embeddings)


def _is_of_first(embeddings: Embeddings, record: IndexRecord) -> bool:
    """Whether an index is of these embeddings, without those behind them."""
    mine = embeddings.fingerprint_of(record.entries)
    return record.entries < len(embeddings) and record.store_fingerprint == mine


def _take_over(path: Path) -> None:
    """Put a finished longer index, if there is one, in the place of the index it goes on from."""
    longer = path / _LONGER
    if not has_index(longer):
        return
    remove(path / RECORD_FILE)  # from here on it is the longer one that is there
    try:
        for name in (FAISS_FILE, RECORD_FILE):
            if (longer / name).exists():
                os.replace(longer / name, path / name)
                sync_directory(path)
    except OSError as error:
        raise not_writable(path, error) from error
    _forget(longer)


def _forget(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        raise not_writable(path, error) from error
