"""What retro-pytorch leaves on disk: raw int32 arrays without a header, and three counts beside.

    *.chunks.dat              (rows, m + 1)   m tokens and the first of the next chunk; 0: padding
    *.seq.dat                 (rows,)         first chunk of every training sequence
    *.doc_ids.dat             (rows,)         document of every chunk
    *.chunks.knn.dat          (rows, k)       neighbours, -1: none
    *.chunks.dat.embedded     (chunks, dim)   float32
    processed-stats.json      {"chunks": ..., "docs": ..., "seqs": ...}

Arrays have more rows than are used, all zero. Neither m nor k is written anywhere: they are given,
or inferred from the file sizes where those allow one reading.
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
    chunk_size: int,
    k: int | None = None,
    stem: str = "train",
    statistics: str = "processed-stats.json",
) -> RetroFiles:
    """Open the files that retro-pytorch's ``TrainingWrapper`` wrote, without changing them.

    Args:
        directory: with the files.
        chunk_size: m, which the files do not say.
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
    return RetroFiles(
        chunks=_read(chunks, "<i4", count, chunk_size + 1),
        sequences=_read(directory / f"{stem}.seq.dat", "<i4", counts["seqs"], 1)[:, 0],
        documents=_read(directory / f"{stem}.doc_ids.dat", "<i4", count, 1)[:, 0],
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


def _read(path: Path, dtype: str, rows: int, columns: int) -> NDArray:
    check(path.is_file(), f"{path} must exist but does not; are directory and stem right?")
    kind = np.dtype(dtype)
    there = path.stat().st_size // kind.itemsize
    check(
        path.stat().st_size % (kind.itemsize * columns) == 0 and there >= rows * columns,
        f"{path} must hold at least {rows:,} rows of {columns} numbers, but its "
        f"{path.stat().st_size:,} bytes are not that; is chunk_size or k another?",
    )
    return np.memmap(path, kind, "r", shape=(rows, columns))
