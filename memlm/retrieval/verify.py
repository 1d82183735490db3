"""Whether the files of a chunk database, and what was made of them, are as they were written."""

from pathlib import Path
from typing import Any

from memlm.core.files import read_json
from memlm.core.journal import Journal
from memlm.index.build import has_index
from memlm.index.record import IndexRecord
from memlm.retrieval import embeddings, neighbours
from memlm.retrieval.chunks import JOURNAL, ChunkDatabase, altered
from memlm.retrieval.index import INDEX


def verify_database(database: ChunkDatabase) -> list[str]:
    """Compare checksums of segments, embeddings, index and table of neighbours, where they are.

    What was made of them is looked for in the folders that ``memlm retro`` uses.

    Returns:
        What is wrong, one sentence each; nothing if all is as written.
    """
    path = database.path
    problems = database.verify() + verify_embeddings(path / embeddings.DIRECTORY)
    if has_index(path / INDEX):
        record = IndexRecord.read(path / INDEX)
        problems += altered(path / INDEX, {record.file: record.checksum} if record.file else {})
    return problems + verify_neighbours(path / neighbours.DIRECTORY)


def verify_embeddings(path: Path) -> list[str]:
    """What is wrong with the embeddings in a directory, finished or not; nothing without any."""
    lines = Journal(path / JOURNAL).read()
    return altered(path, {line["file"]: line["checksum"] for line in lines})


def verify_neighbours(path: Path) -> list[str]:
    """What is wrong with the table in a directory; nothing if there is none that is finished."""
    record: dict[str, Any] = {}
    if (path / neighbours.RECORD).exists():
        record = read_json(path / neighbours.RECORD)
    return altered(path, record.get("checksums", {}))
