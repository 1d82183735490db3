"""Making a chunk database: built, continued after a kill, appended to, deleted from.

Documents are tokenised in order and written segment by segment (a few million tokens each): whole
files first, then one line in the journal, which is the truth until the manifest is written. A
killed build reads the texts again when it continues, compares them with the fingerprints of the
documents it has, and tokenises only the rest.

    nothing there             build
    unfinished                continue, if tokenizer, chunk size and texts are the same
    finished                  nothing to do if they are the same, else refused, naming what differs
    `append_documents`        new segments behind the old ones; chunk numbers stay
    `delete_documents`        a list of numbers; the chunks are never retrieved again
    ``rebuild=True``          from the beginning

Neither the number of documents nor their sizes are set in advance.
"""

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from transformers import PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import FingerprintError, InputError, StoreError
from memlm.core.files import (
    TEMPORARY,
    checksum,
    fingerprint,
    read_json,
    remove_temporaries,
    write_atomic,
    write_json,
)
from memlm.core.journal import Journal
from memlm.data.documents import Document
from memlm.data.fingerprint import tokenizer_hash
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.retrieval.chunks import (
    DELETED,
    FORMAT_VERSION,
    JOURNAL,
    KIND,
    MANIFEST,
    ChunkConfig,
    ChunkDatabase,
    Segment,
    read_manifest,
)
from memlm.store.directory import LOCKS, locked, not_writable

_SEGMENT_CHARACTERS = 16_000_000  # of text; a segment is what a kill can lose
_SAMPLE_CHARACTERS = 200_000


class ChunkPlan(NamedTuple):
    """What building a database would cost, estimated from the first documents.

    Attributes:
        documents: how many there are.
        characters: of all texts.
        tokens: about how many tokens.
        chunks: about how many chunks.
        bytes: on disk, about.
        seconds: of tokenising, about, on this machine.
        text: the plan in one line.
    """

    documents: int
    characters: int
    tokens: int
    chunks: int
    bytes: int
    seconds: float
    text: str


def plan_chunks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    config: ChunkConfig | None = None,
) -> ChunkPlan:
    """Read the texts once, tokenise a sample of them, and say what the whole would take.

    Raises:
        InputError: if there are no documents.
    """
    config = config or ChunkConfig()
    sample: list[Document] = []
    sampled = characters = count = 0
    for document in documents:
        count += 1
        characters += len(document.text)
        if sampled < _SAMPLE_CHARACTERS:
            sample.append(document._replace(text=document.text[:_SAMPLE_CHARACTERS]))
            sampled += len(sample[-1].text)
    begun = time.perf_counter()
    corpus = _tokenize(sample, tokenizer, config, quiet=True)
    scale = characters / max(1, sampled)
    tokens = int(len(corpus) * scale)
    chunks = tokens // config.chunk_size + count
    size = 4 * tokens + 100 * count
    seconds = (time.perf_counter() - begun) * scale
    text = (
        f"{count:,} documents of {characters:,} characters: about {tokens:,} tokens, {chunks:,} "
        f"chunks of {config.chunk_size}, {size / 1e6:,.1f} MB, {seconds:,.0f} s"
    )
    return ChunkPlan(count, characters, tokens, chunks, size, seconds, text)


def build_chunks(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    config: ChunkConfig | None = None,
    *,
    rebuild: bool = False,
    segment_characters: int = _SEGMENT_CHARACTERS,
    quiet: bool = False,
) -> ChunkDatabase:
    """Build a chunk database, or continue or open the one that is there.

    Args:
        documents: named texts, e.g. from ``memlm.read_documents``; the same ones when continuing.
        tokenizer: of the model that will read the chunks.
        path: a new or empty directory, or one of a chunk database.
        config: chunk size, and tokens around documents; None: the defaults.
        rebuild: begin anew, whatever is there.
        segment_characters: of text in a segment, about.
        quiet: show no progress bar.

    Returns:
        The database, opened.

    Raises:
        FingerprintError: if the directory holds a database of other texts, another tokenizer or
            another configuration.
        InputError: if there are no documents.
        StoreError: if the directory holds something else or cannot be written.
    """
    path, config = Path(path), config or ChunkConfig()
    writer = _Writer(path, tokenizer, config, segment_characters, quiet)
    with writer.opened(rebuild):
        if writer.complete:
            writer.compare(documents)
        else:
            writer.write(documents)
    return ChunkDatabase.open(path)


def append_documents(
    database: str | Path,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    segment_characters: int = _SEGMENT_CHARACTERS,
    quiet: bool = False,
) -> ChunkDatabase:
    """Add documents behind those of a database; ones that are already there are passed over.

    Args:
        database: directory of a complete database.
        documents: named texts.
        tokenizer: the one the database was built with.
        segment_characters: see `build_chunks`.
        quiet: alike.

    Raises:
        FingerprintError: for another tokenizer.
        InputError: if a name is there with another text: delete that document first.
        StoreError: if there is no complete database, or the disk refuses.
    """
    there = ChunkDatabase.open(database)
    writer = _Writer(there.path, tokenizer, there.config, segment_characters, quiet)
    with writer.opened(rebuild=False):
        there = ChunkDatabase.open(there.path)  # another process may have appended meanwhile
        known = {
            name: digest
            for number, (name, digest) in enumerate(
                zip(there.names, writer.digests(there.segments), strict=True)
            )
            if not there.deleted[number]
        }
        writer.write(_new(documents, known))
    return ChunkDatabase.open(there.path)


def delete_documents(database: str | Path, names: Iterable[str]) -> ChunkDatabase:
    """Delete documents by name: their chunks are not retrieved, embedded or trained on any more.

    The tokens stay on disk until the database is built again.

    Raises:
        InputError: if there is no document of a name.
    """
    there = ChunkDatabase.open(database)
    wanted = set(names)
    if unknown := sorted(wanted.difference(there.names)):
        raise InputError(
            f"documents to delete must be in the database, but {', '.join(map(repr, unknown[:5]))} "
            f"{'is' if len(unknown) == 1 else 'are'} not in {there.path}; look for names in its "
            "names-*.json"
        )
    numbers = [
        number for number, name in enumerate(there.names) if name in wanted or there.deleted[number]
    ]
    with locked(there.path):
        write_json(there.path / DELETED, {"documents": numbers})
    return ChunkDatabase.open(there.path)


def chunk_corpus(
    corpus: TokenCorpus,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    chunk_size: int = 64,
) -> ChunkDatabase:
    """A chunk database of tokens that are already there, in a new directory.

    Args:
        corpus: the tokens; what stands around documents is taken as it is.
        tokenizer: that made them.
        path: a new or empty directory.
        chunk_size: tokens per chunk.

    Raises:
        InputError: if the directory is not empty.
        StoreError: if it cannot be written.
    """
    path = Path(path)
    config = ChunkConfig(chunk_size=chunk_size)
    check(
        not path.exists() or not any(path.iterdir()),
        f"{path} must be a new or empty directory, but it is not; choose another",
    )
    path.mkdir(parents=True, exist_ok=True)
    digests = [
        xxhash.xxh3_128_hexdigest(name.encode() + corpus.tokens[start:end].tobytes())
        for name, start, end in zip(
            corpus.names, corpus.offsets[:-1], corpus.offsets[1:], strict=True
        )
    ]
    segment = write_segment(path, 0, corpus, digests, chunk_size)
    manifest = _manifest(tokenizer, config)
    write_json(path / MANIFEST, {**manifest, "complete": True, "segments": [segment._asdict()]})
    return ChunkDatabase.open(path)


def write_segment(
    path: Path, number: int, corpus: TokenCorpus, digests: list[str], chunk_size: int
) -> Segment:
    """Write the files of one segment; it counts once a journal or a manifest names it."""
    lengths = corpus.offsets[1:] - corpus.offsets[:-1]
    sizes = np.full_like(lengths, -1) if corpus.text_bytes is None else corpus.text_bytes
    segment = Segment(
        number=number,
        documents=corpus.documents,
        tokens=len(corpus),
        chunks=int((-(-lengths // chunk_size)).sum()),
        checksums={},
    )
    columns = {"tokens": corpus.tokens, "lengths": lengths, "text_bytes": sizes}
    data = save({name: torch.from_numpy(column) for name, column in columns.items()})
    write_atomic(path / segment.token_file, lambda file: file.write(data))
    write_json(path / segment.name_file, {"names": list(corpus.names), "texts": digests})
    for name in (segment.token_file, segment.name_file):
        segment.checksums[name] = checksum(path / name)
    return segment


class _Writer:
    """One attempt at a database."""

    def __init__(
        self,
        path: Path,
        tokenizer: PreTrainedTokenizerBase,
        config: ChunkConfig,
        segment_characters: int,
        quiet: bool,
    ):
        check(
            segment_characters >= 1,
            f"segment_characters must be at least 1, got {segment_characters}",
        )
        self.path, self.tokenizer, self.config = path, tokenizer, config
        self.segment_characters, self.quiet = segment_characters, quiet
        self.journal = Journal(path / JOURNAL)
        self.manifest = _manifest(tokenizer, config)

    @property
    def complete(self) -> bool:
        return self.manifest["complete"]

    @contextlib.contextmanager
    def opened(self, rebuild: bool) -> Iterator[None]:
        """Hold the directory for the block, compared with what is there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = [
                entry.name
                for entry in self.path.iterdir()
                if entry.name != LOCKS and not entry.name.endswith(TEMPORARY)
            ]
        except OSError as error:
            raise not_writable(self.path, error) from error
        if read_manifest(self.path) is None and others:
            raise StoreError(
                f"{self.path} must be a new or empty directory, or a chunk database, but it holds "
                f"{', '.join(sorted(others)[:3])}; choose another directory"
            )
        with locked(self.path):
            there = read_manifest(self.path)
            if there is not None and rebuild:
                self._clear()
                there = None
            if there is None:
                write_json(self.path / MANIFEST, self.manifest)
            else:
                self._same_settings(there)
                self.manifest = there
                if self.complete and not self._journal_segments():
                    self.journal.path.unlink(missing_ok=True)
            yield

    def _clear(self) -> None:
        """Remove everything, the manifest last: until then it is still a database to rebuild."""
        for entry in self.path.iterdir():
            if entry.is_dir() and entry.name != LOCKS:
                shutil.rmtree(entry)
            elif entry.is_file() and entry.name != MANIFEST:
                entry.unlink()
        (self.path / MANIFEST).unlink()

    def digests(self, segments: Iterable[Segment]) -> list[str]:
        """Fingerprints of the texts of finished segments, in order."""
        return [
            digest
            for segment in segments
            for digest in read_json(self.path / segment.name_file)["texts"]
        ]

    def compare(self, documents: Iterable[Document]) -> None:
        """Refuse texts that are not the ones of the finished database."""
        segments = [Segment(**record) for record in self.manifest["segments"]]
        there = Counter(self.digests(segments))
        here = Counter(_digest(document) for document in documents)
        new, gone = (here - there).total(), (there - here).total()
        if new or gone:
            raise FingerprintError(
                f"the texts must be those {self.path} was built from, but {new:,} documents are "
                f"new or changed and {gone:,} are not there any more; append the new ones, or "
                "build again with rebuild (--rebuild)"
            )

    def write(self, documents: Iterable[Document]) -> None:
        """Write all documents but those that the journal has, then the manifest."""
        remove_temporaries(self.path)
        done = Counter(self.digests(self._journal_segments()))
        waiting: list[Document] = []
        characters = 0
        for document in documents:
            digest = _digest(document)
            if done[digest] > 0:
                done[digest] -= 1
                continue
            waiting.append(document)
            characters += len(document.text)
            if characters >= self.segment_characters:
                self._write_segment(waiting)
                waiting, characters = [], 0
        if done.total():
            raise FingerprintError(
                f"the texts must be those that {self.path} was interrupted with, but "
                f"{done.total():,} documents that were read then are gone or changed; give the "
                "same texts, or build again with rebuild (--rebuild)"
            )
        if waiting:
            self._write_segment(waiting)
        segments = [*self.manifest["segments"], *(s._asdict() for s in self._journal_segments())]
        check(bool(segments), "there must be at least one document, got none")
        self.manifest = {**self.manifest, "complete": True, "segments": segments}
        write_json(self.path / MANIFEST, self.manifest)
        self.journal.path.unlink(missing_ok=True)

    def _write_segment(self, documents: list[Document]) -> None:
        corpus = _tokenize(documents, self.tokenizer, self.config, quiet=self.quiet)
        number = len(self.manifest["segments"]) + len(self._journal_segments())
        digests = [_digest(document) for document in documents]
        segment = write_segment(self.path, number, corpus, digests, self.config.chunk_size)
        self.journal.append(segment._asdict())

    def _journal_segments(self) -> list[Segment]:
        """Finished segments behind those of the manifest."""
        first = len(self.manifest["segments"])
        # A kill between manifest and removal of the journal leaves lines that are already in it.
        # A line may be there twice, where a writer was killed and the file was restored.
        records = {record["number"]: record for record in self.journal.read()}
        return [Segment(**records[number]) for number in sorted(records) if number >= first]

    def _same_settings(self, there: dict[str, Any]) -> None:
        differences = [
            f"{name} is {here!r} here and {there['config'].get(name)!r} there"
            for name, here in self.manifest["config"].items()
            if there["config"].get(name) != here
        ]
        if there["tokenizer_hash"] != self.manifest["tokenizer_hash"]:
            differences.append(
                f"the tokenizer is {self.manifest['tokenizer_hash']} here and "
                f"{there['tokenizer_hash']} there"
            )
        if differences:
            raise FingerprintError(
                f"{self.path} must have been made with the settings of this run, but "
                f"{'; '.join(differences)}; repeat those, choose another directory, or build "
                "again with rebuild (--rebuild)"
            )


def _manifest(tokenizer: PreTrainedTokenizerBase, config: ChunkConfig) -> dict[str, Any]:
    """Of a database with nothing in it yet."""
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "config": config.to_dict(),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "tokenizer": tokenizer.name_or_path,
        "segments": [],
    }


def _new(documents: Iterable[Document], known: dict[str, str]) -> Iterator[Document]:
    """The documents that are not known; a known name with another text is refused."""
    for document in documents:
        there = known.get(document.name)
        if there is None:
            yield document
        elif there != _digest(document):
            raise InputError(
                f"a document to append must have a name of its own, but {document.name!r} is in "
                "the database with another text; delete that one first or give this another name"
            )


def _tokenize(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    config: ChunkConfig,
    *,
    quiet: bool,
) -> TokenCorpus:
    return tokenize(documents, tokenizer, begin=config.begin, end=config.end, progress=not quiet)


def _digest(document: Document) -> str:
    return fingerprint([document.name, document.text])
