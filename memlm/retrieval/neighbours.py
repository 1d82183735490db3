"""Neighbour tables: for every chunk of a text, its k nearest chunks of a database, on disk.

RETRO looks neighbours up once, before training (Borgeaud et al. 2022, 2.2). A chunk must not find
itself: if the text is the database, all chunks of its own document are left out, exactly; deleted
documents always are. Beyond the paper, near-duplicates can be left out too: neighbours that, with
their continuation, hold more than a given share of the chunk's own sequences of eight tokens.

    table.json        what was looked up where, by which retriever, with which k; checksums
    ids.npy           (chunks, k) int64, memory-mapped; -1 where there are fewer
    scores.npy        (chunks, k) float32
    journal.jsonl     one line per finished range of chunks, only while it is made

Whatever changed (text, database, retriever, k), the table is not used any more and says so. So it
is after documents were appended or deleted: any chunk may have other neighbours then.
"""

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, FingerprintError, StoreError
from memlm.core.files import (
    checksum,
    fingerprint,
    make_folder,
    read_json,
    sync_directory,
    write_atomic,
    write_json,
)
from memlm.core.journal import Journal
from memlm.core.progress import bar
from memlm.core.types import SearchResult
from memlm.retrieval.chunks import JOURNAL, ChunkDatabase
from memlm.retrieval.retrievers import Retriever, own_documents
from memlm.store.directory import locked

RECORD = "table.json"
DIRECTORY = "neighbours"
NGRAM = 8
_FORMAT_VERSION = 1
_RANGE = 1024  # chunks; what a kill can lose
_SAMPLE = 32  # chunks looked up for a plan


class NeighbourTable:
    """A finished table.

    Attributes:
        path: its directory.
        record: what was looked up where and how, as plain JSON values.
        ids: ``(chunks, k)`` int64 memory map, best first, -1 for none.
        scores: ``(chunks, k)`` float32 memory map, higher is better, -inf for none.
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.record = path, record
        try:
            self.ids: NDArray[np.int64] = np.load(path / "ids.npy", mmap_mode="r")
            self.scores: NDArray[np.float32] = np.load(path / "scores.npy", mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise CorruptStoreError(
                f"{path} must hold ids.npy and scores.npy but they cannot be read ({error}); make "
                "the table again with rebuild (--rebuild)"
            ) from error

    @classmethod
    def open(cls, path: str | Path, text: ChunkDatabase, database: ChunkDatabase) -> Self:
        """The table in the directory ``path``.

        Args:
            path: of the table.
            text: whose chunks were looked up.
            database: in which they were looked up; may be the same.

        Raises:
            StoreError: if there is none or it is not finished.
            FingerprintError: if text or database are not those of the table.
        """
        path = Path(path)
        record = read_json(path / RECORD) if (path / RECORD).exists() else {"complete": False}
        if record.get("format_version", 0) > _FORMAT_VERSION:
            raise StoreError(
                f"{path / RECORD} has format {record['format_version']}, newer than this memlm "
                f"reads ({_FORMAT_VERSION}); upgrade memlm"
            )
        if not record["complete"]:
            raise StoreError(
                f"{path} must hold a finished table of neighbours but does not; run: memlm retro "
                f"neighbours {text.path}"
            )
        for what, here in (("text", text), ("database", database)):
            if record[what] != here.fingerprint:
                raise FingerprintError(
                    f"the neighbours in {path} must be of the {what} {here.path} with fingerprint "
                    f"{here.fingerprint}, but are of {record[what]}; appended or deleted documents "
                    "may change the neighbours of any chunk: make the table again with rebuild "
                    "(--rebuild)"
                )
        return cls(path, record)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def k(self) -> int:
        """Neighbours of each chunk."""
        return self.ids.shape[1]

    def lookup(self, chunks: ArrayLike, k: int | None = None) -> NDArray[np.int64]:
        """The first k neighbours of each chunk, with k appended to the shape; -1 for chunk -1.

        Raises:
            InputError: if the table holds fewer than k.
        """
        k = self.k if k is None else k
        check(1 <= k <= self.k, f"k must lie between 1 and the table's {self.k}, got {k}")
        numbers = np.asarray(chunks, np.int64)
        found = np.array(self.ids[np.maximum(numbers, 0), :k])
        found[numbers < 0] = -1
        return found

    def describe(self) -> dict[str, Any]:
        """What it is, and how many places are empty."""
        empty = int((np.asarray(self.ids) < 0).sum())
        return {**self.record, "chunks": len(self), "empty": empty}


def build_neighbours(
    text: ChunkDatabase,
    retriever: Retriever,
    path: str | Path | None = None,
    *,
    k: int = 2,
    near_duplicates: float | None = None,
    batch_size: int = 64,
    rebuild: bool = False,
    quiet: bool = False,
) -> NeighbourTable:
    """Look up every chunk of a text, or go on where an earlier attempt stopped.

    Args:
        text: whose chunks are looked up: the retriever's own database, or held-out text.
        retriever: of the database.
        path: directory; None: ``neighbours`` in that of the text.
        k: neighbours of each chunk; the paper trains with 2.
        near_duplicates: leave out neighbours that hold at least this share (0 to 1) of the chunk's
            8-token sequences; None: leave out none.
        batch_size: chunks looked up at once.
        rebuild: forget what is there.
        quiet: show no progress bar.

    Returns:
        The table, opened. If no chunk has a neighbour, a UserWarning says so.

    Raises:
        FingerprintError: if the directory holds a table of something else.
        InputError: if the tokenizers or chunk sizes differ, or a number is out of range.
        StoreError: if the disk refuses.
    """
    database = retriever.database
    check(k >= 1, f"k must be at least 1, got {k}")
    check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    check(
        near_duplicates is None or 0 < near_duplicates <= 1,
        f"near_duplicates must be a share above 0 and up to 1, or None, got {near_duplicates}",
    )
    check(
        (text.tokenizer_hash, text.chunk_size) == (database.tokenizer_hash, database.chunk_size),
        f"text and database must have one tokenizer and chunk size, got {text.tokenizer_hash} and "
        f"{text.chunk_size} tokens of {text.path}, {database.tokenizer_hash} and "
        f"{database.chunk_size} tokens of {database.path}; chunk one of them again",
    )
    path = text.path / DIRECTORY if path is None else Path(path)
    make_folder(path)
    record = _record(
        text, database, k, near_duplicates, retriever.describe(), retriever.fingerprint
    )
    with locked(path):
        if rebuild:
            (path / RECORD).unlink(missing_ok=True)
        if _same(path, record):
            (path / JOURNAL).unlink(missing_ok=True)  # of a run that ended before it could
            return NeighbourTable.open(path, text, database)
        _fill(path, text, retriever, k, near_duplicates, batch_size, quiet)
        _complete(path, record)
        (path / JOURNAL).unlink()
    table = NeighbourTable.open(path, text, database)
    if not (np.asarray(table.ids) >= 0).any():
        warnings.warn(
            f"no chunk of {text.path} has a neighbour: the database has {database.documents} "
            "document(s), and a chunk's own document is left out; add documents",
            UserWarning,
            stacklevel=2,
        )
    return table


class NeighbourPlan(NamedTuple):
    """What a table would cost.

    Attributes:
        chunks: to look up.
        bytes: on disk.
        seconds: about, from the time of a few searches.
        text: the plan in one line.
    """

    chunks: int
    bytes: int
    seconds: float
    text: str


def plan_neighbours(text: ChunkDatabase, retriever: Retriever, *, k: int = 2) -> NeighbourPlan:
    """Look up a few chunks and say what all would take."""
    size = 12 * len(text) * k
    numbers = np.unique(np.linspace(0, len(text) - 1, _SAMPLE).astype(np.int64))
    chunks = text.chunks(numbers)
    same = text.fingerprint == retriever.database.fingerprint
    begun = time.perf_counter()
    retriever.search(chunks, k, numbers=numbers if same else None)
    seconds = (time.perf_counter() - begun) * len(text) / len(chunks)
    line = f"{len(text):,} chunks with {k} neighbours: {size / 1e6:,.1f} MB, about {seconds:,.0f} s"
    return NeighbourPlan(len(text), size, seconds, line)


def save_neighbours(
    text: ChunkDatabase,
    database: ChunkDatabase,
    ids: NDArray[np.integer],
    path: str | Path | None = None,
    *,
    source: str,
) -> NeighbourTable:
    """Keep a table that was made elsewhere; its scores are unknown (0, and -inf for none).

    Args:
        text: whose chunks were looked up.
        database: in which.
        ids: ``(chunks, k)``, -1 for none.
        path: a directory; None: ``neighbours`` in that of the text.
        source: where it is from, for `NeighbourTable.describe`.

    Raises:
        InputError: if the numbers are not chunks of the database, one row per chunk of the text.
    """
    check(
        ids.ndim == 2 and len(ids) == len(text) and ids.shape[1] >= 1,
        f"neighbours must be ({len(text)} chunks, k), got {ids.shape}",
    )
    check(
        int(ids.min(initial=-1)) >= -1 and int(ids.max(initial=-1)) < len(database),
        f"neighbours must be chunks below {len(database)}, or -1 for none, got {int(ids.min())} "
        f"to {int(ids.max())}",
    )
    path = text.path / DIRECTORY if path is None else Path(path)
    make_folder(path)
    scores = np.where(ids < 0, -np.inf, 0).astype(np.float32)
    for name, array in (("ids", ids.astype(np.int64)), ("scores", scores)):
        write_atomic(path / f"{name}.npy", lambda file, array=array: np.save(file, array))
    described = {"retriever": source}
    record = _record(text, database, ids.shape[1], None, described, fingerprint(source))
    _complete(path, record)
    return NeighbourTable.open(path, text, database)


def near_duplicate_share(query: NDArray[np.integer], candidate: NDArray[np.integer]) -> float:
    """The share of a chunk's sequences of 8 tokens that a neighbour also holds, from 0 to 1.

    Args:
        query: tokens of the chunk; fewer than 8 are one sequence.
        candidate: tokens of the neighbour, with its continuation.
    """
    size = min(NGRAM, len(query))
    if size == 0 or len(candidate) < size:
        return 0.0
    own = {row.tobytes() for row in _windows(query, size)}
    return len(own & {row.tobytes() for row in _windows(candidate, size)}) / len(own)


def _record(
    text: ChunkDatabase,
    database: ChunkDatabase,
    k: int,
    near_duplicates: float | None,
    retriever: dict[str, Any],
    retriever_fingerprint: str,
) -> dict[str, Any]:
    return {
        "kind": "neighbours",
        "format_version": _FORMAT_VERSION,
        "complete": False,
        "k": k,
        "near_duplicates": near_duplicates,
        "text": text.fingerprint,
        "database": database.fingerprint,
        "retriever": retriever,
        "retriever_fingerprint": retriever_fingerprint,
    }


def _complete(path: Path, record: dict[str, Any]) -> None:
    """Say that the table is finished, and what its files are."""
    checksums = {name: checksum(path / name) for name in ("ids.npy", "scores.npy")}
    write_json(path / RECORD, {**record, "complete": True, "checksums": checksums})


def _same(path: Path, record: dict[str, Any]) -> bool:
    """Whether a finished table of this very kind is there; begins or continues one if not."""
    if not (path / RECORD).exists():
        (path / JOURNAL).unlink(missing_ok=True)
        write_json(path / RECORD, record)
        return False
    there = read_json(path / RECORD)
    names = ("k", "near_duplicates", "text", "database", "retriever_fingerprint")
    different = [
        f"{name} is {record[name]} here and {there.get(name)} there"
        for name in names
        if there.get(name) != record[name]
    ]
    if different:
        raise FingerprintError(
            f"{path} must hold neighbours of this text, database and retriever, but "
            f"{'; '.join(different)}; choose another directory or make the table again with "
            "rebuild (--rebuild)"
        )
    return there["complete"]


def _fill(
    path: Path,
    text: ChunkDatabase,
    retriever: Retriever,
    k: int,
    near_duplicates: float | None,
    batch_size: int,
    quiet: bool,
) -> None:
    journal = Journal(path / JOURNAL)
    files = {"ids": np.int64, "scores": np.float32}
    if not all((path / f"{name}.npy").exists() for name in files):
        journal.path.unlink(missing_ok=True)  # what it says is finished is gone
    finished = {line["first"] for line in journal.read()}
    arrays = {
        name: np.lib.format.open_memmap(
            path / f"{name}.npy", "r+" if finished else "w+", dtype, (len(text), k)
        )
        for name, dtype in files.items()
    }
    sync_directory(path)
    same = text.fingerprint == retriever.database.fingerprint
    dead = text.dead_chunks()
    with bar(len(text), label="neighbours", unit="chunk", quiet=quiet) as shown:
        for first in range(0, len(text), _RANGE):
            end = min(first + _RANGE, len(text))
            if first in finished:
                shown.update(end - first)
                continue
            arrays["ids"][first:end], arrays["scores"][first:end] = -1, -np.inf
            alive = np.arange(first, end)[~dead[first:end]]
            for start in range(0, len(alive), batch_size):
                rows = alive[start : start + batch_size]
                found = _lookup(text, rows, retriever, k, near_duplicates, same)
                arrays["ids"][rows], arrays["scores"][rows] = found.ids, found.scores
                shown.update(len(rows))
            for array in arrays.values():
                array.flush()
            journal.append({"first": first})


def _lookup(
    text: ChunkDatabase,
    rows: NDArray[np.int64],
    retriever: Retriever,
    k: int,
    near_duplicates: float | None,
    same: bool,
) -> SearchResult:
    """Neighbours of some chunks; with duplicates to leave out, ask for more until enough stay."""
    chunks = text.chunks(rows)
    exclusion = own_documents(text, rows) if same else None
    if near_duplicates is None:
        return retriever.search(chunks, k, exclusion, numbers=rows if same else None)
    result = SearchResult(
        torch.full((len(rows), k), -torch.inf), torch.full((len(rows), k), -1, dtype=torch.int64)
    )
    missing, fetch = torch.arange(len(rows)), 2 * k
    while len(missing):
        fetch = min(fetch, len(retriever.database))
        asked = [chunks[row] for row in missing.tolist()]
        part = None if exclusion is None else exclusion.rows(missing)
        own = rows[missing.numpy()] if same else None
        found = retriever.search(asked, fetch, part, numbers=own)
        left = []
        for place, row in enumerate(missing.tolist()):
            kept = _distinct(retriever.database, asked[place], found.ids[place], near_duplicates)
            exhausted = fetch == len(retriever.database) or int(found.ids[place, -1]) < 0
            if len(kept) < k and not exhausted:
                left.append(row)
                continue
            kept = kept[:k]
            result.ids[row, : len(kept)] = found.ids[place, kept]
            result.scores[row, : len(kept)] = found.scores[place, kept]
        missing, fetch = torch.tensor(left, dtype=torch.int64), 4 * fetch
    return result


def _distinct(
    database: ChunkDatabase, query: NDArray[np.integer], ids: torch.Tensor, most: float
) -> list[int]:
    """Columns of the neighbours that are not near-duplicates."""
    tokens, valid = database.gather(ids.numpy())
    return [
        column
        for column in range(len(ids))
        if int(ids[column]) >= 0
        and near_duplicate_share(query, tokens[column, valid[column]]) < most
    ]


def _windows(tokens: NDArray[np.integer], size: int) -> NDArray[np.int64]:
    return np.lib.stride_tricks.sliding_window_view(np.asarray(tokens, np.int64), size)
