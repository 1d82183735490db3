"""What retro-pytorch leaves on disk: raw int32 arrays without a header, and three counts beside.

    *.chunks.dat              (rows, m + 1)   m tokens and the first of the next chunk; 0: padding
    *.seq.dat                 (rows,)         first chunk of every training sequence
    *.doc_ids.dat             (rows,)         document of every chunk
    *.chunks.knn.dat          (rows, k)       neighbours, -1: none
    *.chunks.dat.embedded     (chunks, dim)   float32
    processed-stats.json      {"chunks": ..., "docs": ..., "seqs": ...}

Arrays have more rows than are used, all zero. Neither m nor k is written anywhere, but chunks and
document numbers have as many rows as each other, which gives m, and the counts give k.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.files import read_json


class RetroFiles(NamedTuple):
    """The arrays of one training set, used rows only.

    Attributes:
        chunks: ``(chunks, m + 1)`` int32.
        sequences: ``(sequences,)`` int32.
        documents: ``(chunks,)`` int32.
        neighbours: ``(chunks, k)`` int32, or None.
        embeddings: ``(chunks, dim)`` float32, or None.
    """

    chunks: NDArray[np.int32]
    sequences: NDArray[np.int32]
    documents: NDArray[np.int32]
    neighbours: NDArray[np.int32] | None
    embeddings: NDArray[np.float32] | None


def read_retro_files(
    directory: str | Path,
    *,
    chunk_size: int | None = None,
    k: int | None = None,
    stem: str = "train",
    statistics: str = "processed-stats.json",
) -> RetroFiles:
    """Open the files that retro-pytorch's ``TrainingWrapper`` wrote, without changing them.

    Args:
        directory: with the files.
        chunk_size: m; None: inferred from the sizes of the files.
        k: neighbours per chunk; None: inferred from the size of the file.
        stem: what the names of the files begin with.
        statistics: name of the file of counts.

    Raises:
        InputError: if files are missing, or their sizes do not fit the counts.
        CorruptStoreError: if the counts cannot be read.
    """
    directory = Path(directory)
    counts = read_json(directory / statistics)
    missing = [name for name in ("chunks", "docs", "seqs") if not isinstance(counts.get(name), int)]
    check(
        not missing,
        f"{directory / statistics} must hold the numbers chunks, docs and seqs, but has no "
        f"{', '.join(missing)}; is it retro-pytorch's?",
    )
    count = counts["chunks"]
    chunks = directory / f"{stem}.chunks.dat"
    neighbours = directory / f"{stem}.chunks.knn.dat"
    embedded = directory / f"{stem}.chunks.dat.embedded"
    numbers = directory / f"{stem}.doc_ids.dat"
    columns = _size(chunks) // max(1, _size(numbers))
    check(
        columns >= 2 and columns * _size(numbers) == _size(chunks),
        f"{chunks} must have rows of equal length for each of the {_size(numbers) // 4:,} document "
        f"numbers in {numbers.name}, but has {_size(chunks) // 4:,} numbers; are they of one "
        "training set, made by retro-pytorch 0.1.6 or later?",
    )
    check(
        chunk_size in (None, columns - 1),
        f"chunk_size must be {columns - 1}, as the sizes of {chunks.name} and {numbers.name} say, "
        f"got {chunk_size}",
    )
    return RetroFiles(
        chunks=_read(chunks, "<i4", count, columns),
        sequences=_read(directory / f"{stem}.seq.dat", "<i4", counts["seqs"], 1)[:, 0],
        documents=_read(numbers, "<i4", count, 1)[:, 0],
        neighbours=_read(neighbours, "<i4", count, k or _columns(neighbours, count))
        if neighbours.exists()
        else None,
        embeddings=_read(embedded, "<f4", count, embedded.stat().st_size // (4 * count))
        if embedded.exists()
        else None,
    )


def _columns(path: Path, count: int) -> int:
    """How wide a table of at least ``count`` rows is, if its size allows one answer.

    Reading its data set adds one sequence's rows of zeros to retro-pytorch's table, so there may be
    more rows than chunks, but never twice as many.
    """
    numbers = path.stat().st_size // 4
    widths = [k for k in range(1, numbers // count + 1) if numbers % k == 0]
    check(bool(widths), f"{path} must hold a row for each of {count:,} chunks, but is too small")
    exact = [k for k in widths if numbers // k == count]
    likely = exact or widths[-1:]
    return likely[0]


def _size(path: Path) -> int:
    check(path.is_file(), f"{path} must exist but does not; are directory and stem right?")
    return path.stat().st_size


def _read(path: Path, dtype: str, rows: int, columns: int) -> NDArray:
    kind = np.dtype(dtype)
    there = _size(path) // kind.itemsize
    check(
        there % columns == 0 and there >= rows * columns,
        f"{path} must hold at least {rows:,} rows of {columns} numbers, but its {there:,} numbers "
        "are not that; is k another?",
    )
    return np.memmap(path, kind, "r", shape=(rows, columns))
