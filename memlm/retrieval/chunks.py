"""RETRO's database: documents of tokens, seen as chunks of m tokens (Borgeaud et al. 2022, 2.1).

A document of T tokens has ceil(T / m) chunks. Chunk u of it is a slice, and so is what the model
gets to read of it, the chunk N with its continuation F::

    N = document[u m : (u + 1) m]        F = document[(u + 1) m : (u + 2) m]

Nothing but tokens and document lengths is stored; both slices end exactly where the document ends.
Chunks are numbered through all documents in order, so those of one document are one range of
numbers, which is what a search leaves out when a text must not find itself.

On disk (written by `memlm.retrieval.build`)::

    database.json                 chunk size, tokenizer, one record per segment with checksums
    segment-00000.safetensors     tokens and document lengths of a run of documents, memory-mapped
    names-00000.json              their names and the fingerprints of their texts
    deleted.json                  numbers of deleted documents; chunk numbers never change

Differs from the paper's code: there, overlapping rows of m + 1 tokens in a table of preset size,
and a continuation is recognised by an end-of-text id instead of the document's length.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from memlm.core.config import Config, check
from memlm.core.errors import CorruptStoreError, FingerprintError, StoreError
from memlm.core.files import checksum, fingerprint, read_json

MANIFEST = "database.json"
DELETED = "deleted.json"
JOURNAL = "journal.jsonl"
KIND = "chunk-database"
FORMAT_VERSION = 1

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class ChunkConfig(Config):
    """How text becomes chunks.

    Attributes:
        chunk_size: tokens per chunk; the paper's m is 64.
        begin: put the tokenizer's begin token before every document.
        end: put its end token after every document.
    """

    chunk_size: int = 64
    begin: bool = True
    end: bool = True

    def __post_init__(self):
        check(self.chunk_size >= 1, f"chunk_size must be at least 1 token, got {self.chunk_size}")


class Segment(NamedTuple):
    """A run of documents in one pair of files.

    Attributes:
        number: of the segment, from 0.
        documents: how many it holds.
        tokens: how many they have together.
        chunks: how many chunks they make.
        checksums: of its files, by name.
    """

    number: int
    documents: int
    tokens: int
    chunks: int
    checksums: dict[str, str]

    @property
    def token_file(self) -> str:
        """Name of the file of tokens and lengths."""
        return f"segment-{self.number:05d}.safetensors"

    @property
    def name_file(self) -> str:
        """Name of the file of names and text fingerprints."""
        return f"names-{self.number:05d}.json"


class Retrieved(NamedTuple):
    """Tokens of chunks.

    Attributes:
        tokens: ``(..., length)`` int64; 0 where not valid.
        valid: ``(..., length)`` bool, False past the end of a document and for chunk number -1.
    """

    tokens: Integers
    valid: NDArray[np.bool_]


class ChunkDatabase:
    """A complete chunk database, opened for reading; any number of processes may read one at once.

    Attributes:
        path: its directory.
        config: how text became chunks.
        tokenizer_hash: of the tokenizer that made the tokens.
        segments: what it consists of.
        offsets: ``(documents + 1,)`` where documents begin, in tokens of the whole database.
        chunk_offsets: ``(documents + 1,)`` number of every document's first chunk.
        deleted: ``(documents,)`` bool.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], deleted: list[int]):
        self.path = path
        self.config = ChunkConfig.from_dict(manifest["config"])
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.segments = [Segment(**record) for record in manifest["segments"]]
        lengths = [self._tensor(segment, "lengths") for segment in self.segments]
        counts = np.concatenate(lengths).astype(np.int64)
        self.offsets = _starts(counts)
        self.chunk_offsets = _starts(-(-counts // self.config.chunk_size))
        self.deleted = np.zeros(len(counts), np.bool_)
        self.deleted[deleted] = True
        self._tokens: list[NDArray[np.int32] | None] = [None] * len(self.segments)
        self._token_starts = _starts([segment.tokens for segment in self.segments])

    @classmethod
    def open(cls, path: str | Path, *, tokenizer_hash: str | None = None) -> Self:
        """Open the database in the directory ``path``; reads lengths, but no tokens.

        Args:
            path: its directory.
            tokenizer_hash: of the tokenizer in use, if it must be the database's.

        Raises:
            StoreError: if there is none, it is unfinished, or of a newer format.
            CorruptStoreError: if a file is missing, or damaged in an obvious way.
            FingerprintError: if its tokens were made by another tokenizer.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest is None or not manifest["complete"]:
            found = "holds none" if manifest is None else "holds one that is not finished"
            raise StoreError(
                f"{path} must hold a chunk database but {found}; run: memlm retro chunk {path} "
                "--text TEXT --tokenizer TOKENIZER"
            )
        if tokenizer_hash not in (None, manifest["tokenizer_hash"]):
            raise FingerprintError(
                f"the tokens of {path} must be of the tokenizer in use, but it was made with "
                f"tokenizer {manifest['tokenizer_hash']} and this one is {tokenizer_hash}; use "
                "that tokenizer or chunk the text again"
            )
        deleted = path / DELETED
        numbers = read_json(deleted)["documents"] if deleted.exists() else []
        return cls(path, manifest, numbers)

    def __len__(self) -> int:
        return int(self.chunk_offsets[-1])

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk."""
        return self.config.chunk_size

    @property
    def documents(self) -> int:
        """How many documents there are, deleted ones included."""
        return len(self.deleted)

    @cached_property
    def names(self) -> list[str]:
        """One name per document."""
        return [
            name
            for segment in self.segments
            for name in read_json(self.path / segment.name_file)["names"]
        ]

    @cached_property
    def text_bytes(self) -> Integers:
        """``(documents,)`` UTF-8 bytes of each document's text; -1 where unknown."""
        parts = [self._tensor(segment, "text_bytes") for segment in self.segments]
        return np.concatenate(parts).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Of everything a search in it depends on: texts, tokens, chunk size and deletions."""
        return fingerprint(
            {
                "config": self.config.to_dict(),
                "tokenizer": self.tokenizer_hash,
                "segments": [segment.checksums[segment.token_file] for segment in self.segments],
                "deleted": np.flatnonzero(self.deleted).tolist(),
            }
        )

    def document_of(self, chunks: ArrayLike) -> Integers:
        """The document of each chunk, any shape."""
        return np.searchsorted(self.chunk_offsets, np.asarray(chunks), side="right") - 1

    def document(self, number: int) -> NDArray[np.int32]:
        """All tokens of one document."""
        return self._slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def chunk(self, number: int) -> NDArray[np.int32]:
        """The tokens of one chunk: ``chunk_size`` of them, fewer at the end of a document.

        Raises:
            InputError: if there is no such chunk.
        """
        check(
            0 <= number < len(self),
            f"a chunk's number must lie between 0 and {len(self) - 1}, got {number}",
        )
        return self.chunks(np.array([number]))[0].astype(np.int32)

    def chunks(self, numbers: ArrayLike) -> list[Integers]:
        """The tokens of several chunks, as `chunk` gives those of one."""
        tokens, valid = self.gather(numbers, self.chunk_size)
        return [row[: int(count)] for row, count in zip(tokens, valid.sum(1), strict=True)]

    def gather(self, chunks: ArrayLike, length: int | None = None) -> Retrieved:
        """The tokens from the beginning of each chunk on, within its document.

        Args:
            chunks: chunk numbers of any shape; -1 for none.
            length: tokens of each; None: two chunks, the neighbour and its continuation.

        Returns:
            Tokens and their validity, with ``length`` appended to the shape.

        Raises:
            InputError: if there is no such chunk.
        """
        numbers = np.asarray(chunks, dtype=np.int64)
        check(
            numbers.size == 0 or (int(numbers.min()) >= -1 and int(numbers.max()) < len(self)),
            f"chunks must be numbers below {len(self)}, or -1 for none, got "
            f"{int(numbers.min(initial=0))} to {int(numbers.max(initial=0))}",
        )
        length = 2 * self.chunk_size if length is None else length
        flat = numbers.reshape(-1)
        documents = self.document_of(np.maximum(flat, 0))
        starts = self.offsets[documents] + (flat - self.chunk_offsets[documents]) * self.chunk_size
        counts = np.where(flat < 0, 0, np.minimum(length, self.offsets[documents + 1] - starts))
        tokens = np.zeros((len(flat), length), np.int64)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            if count > 0:
                tokens[row, :count] = self._slice(int(start), int(start + count))
        valid = np.arange(length) < counts[:, None]
        shape = (*numbers.shape, length)
        return Retrieved(tokens.reshape(shape), valid.reshape(shape))

    def own_range(self, chunks: ArrayLike) -> tuple[Integers, Integers]:
        """First chunk, and one past the last, of the document of each chunk ``(n,)``."""
        documents = self.document_of(chunks)
        return self.chunk_offsets[documents], self.chunk_offsets[documents + 1]

    def dead_chunks(self) -> NDArray[np.bool_]:
        """``(chunks,)`` whether each belongs to a deleted document."""
        return np.repeat(self.deleted, np.diff(self.chunk_offsets))

    def describe(self) -> dict[str, Any]:
        """Sizes and identity as plain JSON values, to print with results."""
        return {
            "documents": self.documents,
            "deleted": int(self.deleted.sum()),
            "tokens": int(self.offsets[-1]),
            "chunks": len(self),
            "chunk_size": self.chunk_size,
            "fingerprint": self.fingerprint,
        }

    def verify(self) -> list[str]:
        """What is wrong with the files, by their checksums; nothing if they are as written."""
        return [
            problem
            for segment in self.segments
            for problem in altered(self.path, segment.checksums)
        ]

    def _slice(self, start: int, end: int) -> NDArray[np.int32]:
        """Tokens of the whole database; both ends lie in one segment, as documents do."""
        segment = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        tokens = self._tokens[segment]
        if tokens is None:
            tokens = self._tokens[segment] = self._tensor(self.segments[segment], "tokens")
        first = int(self._token_starts[segment])
        return tokens[start - first : end - first]

    def _tensor(self, segment: Segment, name: str) -> NDArray[Any]:
        path = self.path / segment.token_file
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CorruptStoreError(
                f"{path} must be a safetensors file with the tensor '{name}' but cannot be read "
                f"({error}); restore it from a copy or build the database again with --rebuild"
            ) from error
        expected = segment.tokens if name == "tokens" else segment.documents
        if len(tensor) != expected:
            raise CorruptStoreError(
                f"'{name}' in {path} must have {expected:,} entries, got {len(tensor):,}; restore "
                "it from a copy or build the database again with --rebuild"
            )
        return tensor.numpy()


def altered(path: Path, checksums: dict[str, str]) -> list[str]:
    """Which files of a directory are missing or not as they were written, one sentence each.

    Args:
        path: the directory.
        checksums: by name of the file.
    """
    problems = []
    for name, expected in checksums.items():
        if not (path / name).exists():
            problems.append(f"{path / name} is missing")
        elif checksum(path / name) != expected:
            problems.append(f"{path / name} was altered")
    return problems


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest in the directory ``path``, or None if there is none.

    Raises:
        StoreError: if it is of something else or of a newer format.
    """
    if not (path / MANIFEST).exists():
        return None
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version", 0)
    if manifest.get("kind") != KIND or version > FORMAT_VERSION:
        raise StoreError(
            f"{path / MANIFEST} must be of a chunk database of format {FORMAT_VERSION} or older, "
            f"got {manifest.get('kind')!r} of format {version}; choose another directory or "
            "upgrade memlm"
        )
    return manifest


def _starts(counts: ArrayLike) -> Integers:
    values = np.asarray(counts, dtype=np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
