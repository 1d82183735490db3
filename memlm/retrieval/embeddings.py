"""Embeddings of all chunks of a database: batched by length, resumable, memory-mapped.

A range of chunks is embedded in batches of similar length (so that little padding is computed) and
written as one file, then one line goes to the journal. A range never reaches over a segment, and a
segment never changes, so after documents were appended only their ranges are missing, and what was
deleted needs nothing: a search leaves it out.

    embeddings.json        what encoder, of which chunks
    journal.jsonl          one line per finished range, with its checksum
    keys-00000.npy         (rows, dim) float32, memory-mapped

`Embeddings` is a source of keys for every index of `memlm.index`.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, FingerprintError, StoreError
from memlm.core.files import (
    checksum,
    fingerprint,
    make_folder,
    read_json,
    remove_temporaries,
    write_atomic,
    write_json,
)
from memlm.core.journal import Journal
from memlm.core.progress import bar
from memlm.retrieval.chunks import JOURNAL, ChunkDatabase, Segment
from memlm.store.directory import locked

RECORD = "embeddings.json"
DIRECTORY = "embeddings"
_RANGE = 8192  # chunks; what a kill can lose


class ChunkEncoder(Protocol):
    """Tokens of chunks become vectors. `memlm.models.text_encoder` has two."""

    @property
    def dim(self) -> int:
        """Width of a vector."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of everything its vectors depend on."""
        ...

    def encode(self, chunks: Sequence[NDArray[np.integer]], /) -> Tensor:
        """One batch: ``(chunks, dim)`` float32 on the CPU."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings as plain JSON values."""
        ...


class Range(NamedTuple):
    """Chunks whose embeddings are one file.

    Attributes:
        number: of the range, from 0.
        first: chunk.
        end: one past the last.
        segment: fingerprint of the segment they belong to.
    """

    number: int
    first: int
    end: int
    segment: str


class Embeddings:
    """The finished embeddings of a database: a source of keys for an index.

    Attributes:
        path: their directory.
        dim: width of an embedding.
        encoder_fingerprint: of the encoder that made them.
        fingerprint: of all of them, by which an index knows that it is theirs.
    """

    def __init__(self, path: Path, record: dict[str, Any], rows: list[dict[str, Any]]):
        self.path = path
        self.dim: int = record["dim"]
        self.encoder_fingerprint: str = record["encoder"]
        self._record, self._rows = record, rows
        self.fingerprint: str = self._of(rows)
        self._starts = np.array([row["first"] for row in rows] + [rows[-1]["end"]])
        self._files = [path / row["file"] for row in rows]
        self._mapped: list[NDArray[np.float32] | None] = [None] * len(rows)

    @classmethod
    def open(cls, path: str | Path, database: ChunkDatabase) -> Self:
        """The embeddings in the directory ``path``.

        Raises:
            StoreError: if they are missing or not finished for all chunks of the database.
            FingerprintError: if they are of other chunks.
        """
        path = Path(path)
        if not (path / RECORD).exists():
            raise StoreError(
                f"{path} must hold the embeddings of {database.path} but holds none; run: memlm "
                f"retro embed {database.path} --encoder ENCODER"
            )
        record = read_json(path / RECORD)
        _check_chunks(path, record, database)
        finished = _finished(path, _ranges(database))
        missing = [part for part in _ranges(database) if part.number not in finished]
        if missing:
            chunks = sum(part.end - part.first for part in missing)
            raise StoreError(
                f"{path} must hold an embedding of every chunk, but those of {chunks:,} chunks are "
                f"missing; run memlm retro embed {database.path} again to continue"
            )
        return cls(path, record, [finished[number] for number in sorted(finished)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def fingerprint_of(self, count: int) -> str | None:
        """The fingerprint when there were ``count`` of them; None if there never were so many."""
        rows = [row for row in self._rows if row["end"] <= count]
        return self._of(rows) if rows and rows[-1]["end"] == count else None

    def _of(self, rows: list[dict[str, Any]]) -> str:
        return fingerprint([self._record, [row["checksum"] for row in rows]])

    def blocks(self, rows: int, /) -> Iterator[tuple[int, Tensor]]:
        """All embeddings in order, up to ``rows`` at a time."""
        for number in range(len(self._files)):
            part = self._part(number)
            for start in range(0, len(part), rows):
                block = np.array(part[start : start + rows])
                yield int(self._starts[number]) + start, torch.from_numpy(block)

    def gather(self, ids: Tensor, /) -> Tensor:
        """Embeddings of chunks ``ids``, any shape."""
        flat = ids.reshape(-1).cpu().numpy()
        found = np.empty((len(flat), self.dim), np.float32)
        parts = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(parts):
            mine = parts == number
            found[mine] = self._part(int(number))[flat[mine] - self._starts[number]]
        return torch.from_numpy(found).reshape(*ids.shape, self.dim)

    def load_keys(self) -> Tensor:
        """All embeddings in memory, ``(chunks, dim)``."""
        return torch.cat([block for _, block in self.blocks(1 << 20)])

    def _part(self, number: int) -> NDArray[np.float32]:
        mapped = self._mapped[number]
        if mapped is None:
            try:
                mapped = np.load(self._files[number], mmap_mode="r")
            except (OSError, EOFError, ValueError) as error:
                raise CorruptStoreError(
                    f"{self._files[number]} must be an array of embeddings but cannot be read "
                    f"({error}); embed again with rebuild (--rebuild)"
                ) from error
            self._mapped[number] = mapped
        return mapped


class EmbeddingPlan(NamedTuple):
    """What embedding a database would cost.

    Attributes:
        chunks: how many there are.
        bytes: on disk.
        seconds: about, from the time of one batch.
        text: the plan in one line.
    """

    chunks: int
    bytes: int
    seconds: float
    text: str


def plan_embeddings(
    database: ChunkDatabase, encoder: ChunkEncoder, *, batch_size: int = 64
) -> EmbeddingPlan:
    """Embed one batch and say what all would take."""
    size = 4 * len(database) * encoder.dim
    numbers = np.unique(np.linspace(0, len(database) - 1, batch_size).astype(np.int64))
    chunks = database.chunks(numbers)
    encoder.encode(chunks[:1])  # the first call is slow
    begun = time.perf_counter()
    encoder.encode(chunks)
    seconds = (time.perf_counter() - begun) * len(database) / len(chunks)
    text = (
        f"{len(database):,} chunks, {encoder.dim} dimensions: {size / 1e6:,.1f} MB, about "
        f"{seconds:,.0f} s from nothing"
    )
    return EmbeddingPlan(len(database), size, seconds, text)


def embed_chunks(
    database: ChunkDatabase,
    encoder: ChunkEncoder,
    path: str | Path | None = None,
    *,
    batch_size: int = 64,
    rebuild: bool = False,
    quiet: bool = False,
) -> Embeddings:
    """Embed every chunk that is not embedded yet.

    Args:
        database: whose chunks.
        encoder: see `memlm.models.text_encoder`.
        path: directory; None: ``embeddings`` in that of the database.
        batch_size: chunks the encoder gets at once.
        rebuild: forget what is there.
        quiet: show no progress bar.

    Returns:
        The embeddings, opened.

    Raises:
        FingerprintError: if those that are there are of another encoder or other chunks.
        InputError: if an embedding is not finite.
        StoreError: if the disk refuses.
    """
    check(batch_size >= 1, f"batch_size must be at least 1, got {batch_size}")
    path = database.path / DIRECTORY if path is None else Path(path)
    make_folder(path)
    record = {
        "dim": encoder.dim,
        "encoder": encoder.fingerprint,
        "settings": encoder.describe(),
        "tokenizer": database.tokenizer_hash,
        "chunk_size": database.chunk_size,
    }
    journal = Journal(path / JOURNAL)
    with locked(path):
        remove_temporaries(path)
        if rebuild:
            journal.path.unlink(missing_ok=True)
            for old in (path / RECORD, *path.glob("keys-*.npy")):
                old.unlink(missing_ok=True)
        if (path / RECORD).exists():
            there = read_json(path / RECORD)
            _check_chunks(path, there, database)
            if there["encoder"] != encoder.fingerprint:
                raise FingerprintError(
                    f"{path} must be of the encoder in use, {encoder.describe()} with fingerprint "
                    f"{encoder.fingerprint}, but was made with {there['settings']} of "
                    f"{there['encoder']}; use that one, another directory, or rebuild (--rebuild)"
                )
        else:
            write_json(path / RECORD, record)
        planned = _ranges(database)
        finished = _finished(path, planned)
        done = sum(part.end - part.first for part in planned if part.number in finished)
        with bar(len(database), label="embed", unit="chunk", initial=done, quiet=quiet) as shown:
            for part in planned:
                if part.number in finished:
                    continue
                keys = _embed(database, encoder, part, batch_size, shown.update)
                file = path / f"keys-{part.number:05d}.npy"
                write_atomic(file, lambda opened, keys=keys: np.save(opened, keys))
                journal.append({**part._asdict(), "file": file.name, "checksum": checksum(file)})
    return Embeddings.open(path, database)


def _embed(database, encoder, part: Range, batch_size: int, update) -> NDArray[np.float32]:
    numbers = np.arange(part.first, part.end)
    chunks = database.chunks(numbers)
    lengths = np.array([len(chunk) for chunk in chunks])
    keys = np.empty((len(numbers), encoder.dim), np.float32)
    order = np.argsort(-lengths, kind="stable")  # the longest first: memory runs out at once
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        keys[rows] = encoder.encode([chunks[row] for row in rows]).numpy()
        update(len(rows))
    bad = np.flatnonzero(~np.isfinite(keys).all(1))
    check(
        len(bad) == 0,
        f"embeddings must be finite, but those of {len(bad)} chunks from chunk "
        f"{part.first + int(bad[0]) if len(bad) else 0} on are not; use the encoder in float32",
    )
    return keys


def _ranges(database: ChunkDatabase) -> list[Range]:
    ranges: list[Range] = []
    first = 0
    for segment in database.segments:
        for start in range(first, first + segment.chunks, _RANGE):
            end = min(start + _RANGE, first + segment.chunks)
            ranges.append(Range(len(ranges), start, end, _of(segment)))
        first += segment.chunks
    return ranges


def _of(segment: Segment) -> str:
    return segment.checksums[segment.token_file]


def _finished(path: Path, planned: list[Range]) -> dict[int, dict[str, Any]]:
    """Lines of the journal that fit the plan, by number of the range."""
    plan = {part.number: part for part in planned}
    finished = {}
    for line in Journal(path / JOURNAL).read():
        part = plan.get(line["number"])
        mine = part is not None and all(line[key] == value for key, value in part._asdict().items())
        if mine and (path / line["file"]).exists():
            finished[line["number"]] = line
    return finished


def _check_chunks(path: Path, record: dict[str, Any], database: ChunkDatabase) -> None:
    here = (database.tokenizer_hash, database.chunk_size)
    there = (record["tokenizer"], record["chunk_size"])
    if here != there:
        raise FingerprintError(
            f"the embeddings in {path} must be of the chunks of {database.path} (tokenizer "
            f"{here[0]}, {here[1]} tokens), but are of tokenizer {there[0]}, {there[1]} tokens; "
            "embed again with rebuild (--rebuild)"
        )
