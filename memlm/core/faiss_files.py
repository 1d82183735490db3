"""FAISS files: whole or absent, like every file here. FAISS is imported when one is touched."""

from pathlib import Path
from typing import Any

from memlm.core.errors import CorruptStoreError
from memlm.core.files import write_atomic


def write_faiss(index: Any, path: Path) -> None:
    """Write a FAISS index to ``path`` whole or not at all, without a copy in memory."""
    import faiss

    def write(file):
        try:
            writer = faiss.PyCallbackIOWriter(file.write)  # pyright: ignore[reportAttributeAccessIssue]
            faiss.write_index(index, writer)
        except RuntimeError as error:
            raise OSError(f"FAISS: {error}") from error

    write_atomic(path, write)


def read_faiss(path: Path, *, mapped: bool = False) -> Any:
    """Read a FAISS file.

    Args:
        path: of the file.
        mapped: leave inverted lists on disk and read those that a search visits; only indexes with
            plain lists (IVF) are mapped, others are read whole.

    Raises:
        CorruptStoreError: if it is missing or FAISS cannot read it.
    """
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError as error:
        raise CorruptStoreError(
            f"{path} must be a FAISS index but FAISS cannot read it; check the path, or build the "
            "index again"
        ) from error
