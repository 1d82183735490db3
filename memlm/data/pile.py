"""Files in the format of the Pile: split by subset, and read from short to long.

A line of the Pile (Gao et al. 2020) is ``{"text": ..., "meta": {"pile_set_name": ...}}``. Split,
each subset is a file ``<subset>.jsonl`` with one JSON string per line, which every command reads.

Source: LM-Infinite (Han et al. 2024) and its scripts, which measure long documents of ArXiv and
OpenWebText2. Two habits of theirs are kept: documents come by length in characters, so that those
to leave out are the shortest, and documents of ArXiv without a colon are dropped.
"""

import json
from contextlib import ExitStack
from pathlib import Path

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.data.documents import Document, read_documents, read_records


def split_pile(source: str | Path, out: str | Path) -> dict[str, int]:
    """Write every subset of a file to a file of its own.

    Args:
        source: a .jsonl file, compressed or not.
        out: folder for ``<subset>.jsonl``; files of these names are replaced when all is read.

    Returns:
        Documents of each subset, in the order of their names.

    Raises:
        InputError: if a line has no text or no subset, or the subset's name is no file name.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        files = {}
        for where, record in read_records(Path(source)):
            name, text = _subset_and_text(record, where)
            if name not in files:
                unfinished = folder / f"{name}.jsonl.tmp"
                files[name] = stack.enter_context(open(unfinished, "w", encoding="utf-8"))
            files[name].write(json.dumps(text) + "\n")
            counts[name] = counts.get(name, 0) + 1
    for name in counts:
        (folder / f"{name}.jsonl.tmp").replace(folder / f"{name}.jsonl")
    return dict(sorted(counts.items()))


def read_pile(
    path: str | Path, *, start: int | None = None, limit: int | None = None
) -> list[Document]:
    """Documents of one subset, shortest first.

    Args:
        path: a file that ``split_pile`` wrote, or any other source of ``read_documents``. From a
            file named ArXiv, documents without a colon are dropped.
        start: leave out so many of the shortest.
        limit: read so many after them.

    Raises:
        InputError: if a number is out of range or there is no document.
    """
    check(start is None or start >= 0, f"start must be at least 0, got {start}")
    check(limit is None or limit >= 1, f"limit must be at least 1 document, got {limit}")
    needed = ":" if Path(path).name.split(".")[0] == "ArXiv" else ""
    documents = [document for document in read_documents(path) if needed in document.text]
    documents.sort(key=lambda document: len(document.text))
    first = start or 0
    return documents[first : None if limit is None else first + limit]


def _subset_and_text(record: object, where: str) -> tuple[str, str]:
    match record:
        case {"text": str(text), "meta": {"pile_set_name": str(name)}}:
            check(
                name not in ("", ".", "..") and not set(name) & set("/\\\0"),
                f"the subset of {where} must be usable as the name of a file, got {name!r}",
            )
            return name, text
    raise InputError(
        f"{where} must have the fields text and meta.pile_set_name, as the files of the Pile have; "
        "other .jsonl files need no splitting"
    )
