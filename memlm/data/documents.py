"""Documents: named texts from files, folders, records, data sets or memory.

A document is the unit in which text is remembered and evaluated: windows do not reach over its ends
by default, and a remembered token names the document it came from. What becomes one document:

* a text file (also .gz, .bz2, .xz, .zst): one, or several if a separator is given;
* a .jsonl file: one per line, the text in one field, or the line itself a JSON string;
* a folder: those of every text file in it, in the order of their paths;
* a data set or any iterable: one per row, string or ``Document``.

Texts are read one after another, in an order that depends on nothing but their names. Nothing is
cleaned: what is in the file is in the document, but for a byte-order mark and Windows line ends.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.optional import require

SUFFIXES = tuple(
    f".{name}"
    for name in (
        *("txt", "text", "tokens", "md", "markdown", "rst", "adoc", "org", "tex", "jsonl", "log"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cs", "go", "hs", "java", "jl", "js", "kt"),
        *("lua", "ml", "php", "pl", "r", "rb", "rs", "scala", "sh", "sql", "swift", "ts"),
        *("toml", "yaml", "yml", "ini", "cfg"),
    )
)
"""Files of a folder that are read, by the end of their names, compressed or not."""

_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
_BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and where it came from.

    Attributes:
        name: path, id or title; shown as the source of what was remembered.
        text: the text itself, possibly empty.
    """

    name: str
    text: str


Source = str | Path | Iterable[Any]


def read_documents(
    source: Source,
    *,
    text_field: str = "text",
    separator: str | None = None,
    suffixes: Iterable[str] = SUFFIXES,
    limit: int | None = None,
) -> Iterator[Document]:
    """The documents of a source, in a fixed order, read as they are asked for.

    Args:
        source: the path of a file or folder; or a ``datasets`` data set, or an iterable of
            strings, ``Document``s or mappings with a text field.
        text_field: the field of a record (.jsonl line, data set row) that holds the text. Records
            are named by their ``id`` or ``title`` field, else by file and line or by number.
        separator: split text files here into several documents, named ``file#1``, ``file#2``, ...
            Pieces of white space alone are dropped, except with ``"\\n"``: blank lines are lines.
            Records, rows and strings are documents already and are not split.
        suffixes: which files of a folder are read; hidden files and folders never are.
        limit: stop after this many documents.

    Raises:
        InputError: if the path does not exist, the source has no document, a record has no such
            field, or a file is not UTF-8 text.
        MissingExtraError: for .zst files without the package zstandard.
    """
    check(limit is None or limit >= 1, f"limit must be at least 1 document, got {limit}")
    check(separator != "", "a separator must have at least one character, got an empty one")
    if isinstance(source, Mapping):
        raise InputError(
            "documents must come from one data set, got several by name "
            f"({', '.join(map(repr, list(source)[:5]))}); choose one of them"
        )
    if isinstance(source, str | Path):
        documents = _from_path(Path(source), text_field, separator, tuple(suffixes))
    elif isinstance(source, Iterable):
        documents = _from_items(source, text_field)
    else:
        raise InputError(
            "documents must come from a path, a data set or an iterable of strings, got "
            f"{type(source).__name__}"
        )
    return _some(islice(documents, limit), source)


def _some(documents: Iterator[Document], source: Source) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = False
        yield document
    if empty:
        shown = source if isinstance(source, str | Path) else f"the {type(source).__name__}"
        raise InputError(f"there must be at least one document, but {shown} holds none")


def _from_path(
    path: Path, text_field: str, separator: str | None, suffixes: tuple[str, ...]
) -> Iterator[Document]:
    if path.is_file():
        return _from_file(path, path.name, text_field, separator)
    if not path.is_dir():
        raise InputError(
            f"{str(path)[:200]!r} must be a file or folder but does not exist; check the path, or "
            "pass [text] if this is the text itself"
        )
    files = _text_files(path, suffixes)
    if not files:
        raise InputError(
            f"{path} must hold text files, but none of its files ends in "
            f"{' '.join(suffixes)} (or one of these and {' '.join(_OPENERS)}); name a file "
            "directly or pass suffixes"
        )
    return (
        document
        for file in files
        for document in _from_file(file, file.relative_to(path).as_posix(), text_field, separator)
    )


def _text_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            plain = name.lower()
            for ending in _OPENERS:
                plain = plain.removesuffix(ending)
            if not name.startswith(".") and plain.endswith(suffixes):
                found.append(Path(parent, name))
    # By the parts of the path: the order of os.walk is that of the file system.
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _from_file(path: Path, name: str, text_field: str, separator: str | None) -> Iterator[Document]:
    plain = path.name.lower()
    for ending in _OPENERS:
        plain = plain.removesuffix(ending)
    try:
        with _open(path) as file:
            if plain.endswith(".jsonl"):
                yield from _records(file, path, name, text_field)
                return
            text = _decode(file.read(), str(path)).replace("\r\n", "\n")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    if separator is None:
        yield Document(name, text)
        return
    pieces = text.split(separator)
    if separator == "\n" and pieces[-1] == "":
        pieces.pop()  # the end of the last line, not a line
    kept = (piece for piece in pieces if separator == "\n" or piece.strip())
    for number, piece in enumerate(kept, start=1):
        yield Document(f"{name}#{number}", piece)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Every line of a .jsonl file, compressed or not, with what errors call it.

    Raises:
        InputError: if the file cannot be read or a line is not JSON.
    """
    try:
        with _open(path) as file:
            yield from ((where, record) for _, where, record in _json_lines(file, path))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _records(file: BinaryIO, path: Path, name: str, text_field: str) -> Iterator[Document]:
    for number, where, record in _json_lines(file, path):
        if isinstance(record, str):
            yield Document(f"{name}:{number}", record)
            continue
        if not isinstance(record, dict):
            raise InputError(f"{where} must be one JSON object, got {type(record).__name__}")
        yield _from_record(record, text_field, where, f"{name}:{number}")


def _json_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(file, start=1):
        where = f"{path}, line {number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} must be one JSON object, but is not ({error})") from error
        yield number, where, record


def _from_items(items: Iterable[Any], text_field: str) -> Iterator[Document]:
    for number, item in enumerate(items):
        if isinstance(item, Document):
            yield item
        elif isinstance(item, str):
            yield Document(str(number), item)
        elif isinstance(item, Mapping):
            yield _from_record(item, text_field, f"row {number}", str(number))
        else:
            raise InputError(
                "every item must be a string, a Document or a row with a text field, but item "
                f"{number} is {type(item).__name__}"
            )


def _from_record(
    record: Mapping[str, Any], text_field: str, where: str, otherwise: str
) -> Document:
    if text_field not in record:
        raise InputError(
            f"{where} must have the field '{text_field}', but its fields are "
            f"{', '.join(map(repr, record)) or 'none'}; pass text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            f"the field '{text_field}' of {where} must be a text, got {type(text).__name__}"
        )
    named = (record[key] for key in ("id", "title") if record.get(key) not in (None, ""))
    return Document(str(next(named, otherwise)), text)


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path} must be a file that can be read, but is not ({error})")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} must be UTF-8 text, but byte {error.start} ({data[error.start]:#04x}) is "
            "not; convert it to UTF-8 or leave it out"
        ) from error


def _open(path: Path) -> BinaryIO:
    for ending, opener in _OPENERS.items():
        if path.name.lower().endswith(ending):
            return opener(path)
    return open(path, "rb")


def _open_zst(path: Path) -> BinaryIO:
    return io.BufferedReader(_ZstReader(path))


class _ZstReader(io.RawIOBase):
    """A .zst file as plain bytes. zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, path: Path):
        self._blocks = _zst_blocks(path)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = block
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _zst_blocks(path: Path) -> Iterator[bytes]:
    zstandard = require("zstandard", extra="zstd", purpose=f"read {path}")
    frame = None
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the compressed data end too early")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}
