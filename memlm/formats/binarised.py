"""Binarised text of fairseq: ``NAME.bin`` with all ids, ``NAME.idx`` with where lines begin.

The index is little-endian: the magic ``MMIDIDX`` and two zero bytes, uint64 version 1, one byte for
the type of ids, uint64 count, then int32 sizes and int64 byte offsets of the lines. Both files are
memory-mapped. Older kinds of index (``--dataset-impl lazy`` or ``cached``) are refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError
from memlm.core.files import write_atomic
from memlm.data.tokens import TokenCorpus
from memlm.formats.dictionary import corpus_of_lines

_MAGIC = b"MMIDIDX\x00\x00"
_OLD_MAGIC = b"TNTIDX"
_HEADER = len(_MAGIC) + 8 + 1 + 8
_TYPES = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f8"),
    8: np.dtype("<u2"),
}


class Lines(NamedTuple):
    """Binarised lines, memory-mapped.

    Attributes:
        tokens: ``(n,)`` ids of all lines, one after another.
        sizes: ``(lines,)`` int32.
    """

    tokens: NDArray[np.integer]
    sizes: NDArray[np.int32]


def read_lines(prefix: str | Path) -> Lines:
    """Open binarised text.

    Args:
        prefix: what comes before ``.bin`` and ``.idx``; either file's own name will do.

    Raises:
        CorruptStoreError: if a file is missing, cut, or of another kind.
    """
    prefix = _prefix(prefix)
    index, data = (prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin"))
    for file in (index, data):
        if not file.is_file():
            raise CorruptStoreError(f"{file} must exist but does not; is the path right?")
    raw = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
    head = raw[:_HEADER].tobytes()
    if head.startswith(_OLD_MAGIC):
        raise CorruptStoreError(
            f"{index} must be an index of the kind 'mmap', but is of an older one; binarise the "
            "text again with --dataset-impl mmap"
        )
    code = head[17] if len(head) == _HEADER else 0
    version = int.from_bytes(head[9:17], "little")
    if not head.startswith(_MAGIC) or version != 1 or code not in _TYPES:
        raise CorruptStoreError(
            f"{index} must begin with fairseq's mark, version 1 and a known type of numbers, got "
            f"{head[:9]!r}, {version} and {code}; fetch it again"
        )
    kind = _TYPES[code]
    count = int.from_bytes(head[18:], "little")
    if len(raw) != _HEADER + 12 * count:
        raise CorruptStoreError(
            f"{index} must have {_HEADER + 12 * count:,} bytes for {count:,} lines, got "
            f"{len(raw):,}; fetch it again"
        )
    sizes = np.frombuffer(raw, "<i4", count, _HEADER)
    offsets = np.frombuffer(raw, "<i8", count, _HEADER + 4 * count)
    ends = np.cumsum(sizes, dtype=np.int64) * kind.itemsize
    total = int(ends[-1]) if count else 0
    together = np.array_equal(offsets, ends - sizes.astype(np.int64) * kind.itemsize)
    if not together or data.stat().st_size != total:
        raise CorruptStoreError(
            f"{data} must hold the {total:,} bytes of the lines of {index.name}, one after "
            f"another, got {data.stat().st_size:,}; fetch both again"
        )
    tokens: Any = np.memmap(data, kind, "r") if total else np.zeros(0, kind)
    return Lines(tokens, sizes)


def read_corpus(prefix: str | Path) -> TokenCorpus:
    """Binarised text as a corpus of lines, ``</s>`` before the first (see `corpus_of_lines`).

    Args:
        prefix: as for `read_lines`.

    Raises:
        CorruptStoreError: as `read_lines`.
        InputError: if there are no lines, or numbers are not ids.
    """
    lines = read_lines(prefix)
    check(len(lines.sizes) > 0, f"{prefix} must hold at least one line, got none")
    check(
        lines.tokens.dtype.kind in "iu",
        f"{prefix} must hold ids, but its numbers are {lines.tokens.dtype}",
    )
    return corpus_of_lines(lines.tokens, lines.sizes)


def write_lines(prefix: str | Path, lines: Lines) -> None:
    """Write binarised text that fairseq reads.

    Args:
        prefix: what comes before ``.bin`` and ``.idx``.
        lines: ids and sizes; the ids keep their type.
    """
    prefix = _prefix(prefix)
    kind = lines.tokens.dtype.newbyteorder("<")
    code = next((code for code, known in _TYPES.items() if known == kind), None)
    check(code is not None, f"ids must be of a type that fairseq knows, got {kind}")
    sizes = np.asarray(lines.sizes, "<i4")
    offsets = (np.cumsum(sizes, dtype=np.int64) - sizes) * kind.itemsize
    count = len(sizes).to_bytes(8, "little")
    head = _MAGIC + (1).to_bytes(8, "little") + bytes([code or 0]) + count
    body = head + sizes.tobytes() + offsets.astype("<i8").tobytes()
    write_atomic(
        prefix.with_name(prefix.name + ".bin"),
        lambda file: file.write(np.ascontiguousarray(lines.tokens, kind).data),
    )
    write_atomic(prefix.with_name(prefix.name + ".idx"), lambda file: file.write(body))


def _prefix(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
