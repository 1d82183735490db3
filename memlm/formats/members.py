"""Clusters in the published files: a pickled sparse matrix, read without running a pickle.

knn-transformers and the fairseq version of RetoMaton keep clusters as a pickled
``scipy.sparse.csr_matrix`` of ones, one row per cluster and one column per entry. A pickle may name
any function of any module and have it called. Here only the handful of names that such a matrix
consists of are admitted, under their old and new module paths, and none of them is imported: the
matrix becomes a plain holder of its attributes (so SciPy is not needed), arrays and number formats
are NumPy's own. Every other name is refused before anything happens.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError


class Members(NamedTuple):
    """The members of clusters as compressed rows.

    Attributes:
        offsets: ``(clusters + 1,)`` int64.
        members: ``(assigned,)`` int64 entries; those of cluster c are
            ``members[offsets[c]:offsets[c + 1]]``.
        entries: columns of the matrix: one more than the highest entry, not always the store's
            size.
    """

    offsets: NDArray[np.int64]
    members: NDArray[np.int64]
    entries: int


def read_members(path: str | Path) -> Members:
    """Read a members file.

    Args:
        path: of a pickled ``csr_matrix``.

    Raises:
        InputError: if the file names anything but a sparse matrix of numbers.
        CorruptStoreError: if it is missing or is not a whole pickle of one.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            matrix = _Restricted(file, path).load()
    except InputError:
        raise
    except FileNotFoundError as error:
        raise CorruptStoreError(f"{path} must exist but does not; is the path right?") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CorruptStoreError(
            f"{path} must be a pickled csr_matrix but cannot be read "
            f"({type(error).__name__}: {error}); fetch it again"
        ) from error
    check(
        isinstance(matrix, _Matrix),
        f"{path} must hold one sparse matrix, got {type(matrix).__name__}",
    )
    offsets, members = _integers(matrix, "indptr", path), _integers(matrix, "indices", path)
    shape = getattr(matrix, "_shape", None)
    whole = (
        isinstance(shape, tuple)
        and len(shape) == 2
        and len(offsets) == int(shape[0]) + 1
        and offsets[0] == 0
        and offsets[-1] == len(members)
        and bool((np.diff(offsets) >= 0).all())
        and (len(members) == 0 or (members.min() >= 0 and members.max() < int(shape[1])))
    )
    if not whole or shape is None:
        raise CorruptStoreError(
            f"{path} must hold rows of a matrix, but its {len(offsets)} row ends and "
            f"{len(members)} columns do not fit the shape {shape}; fetch it again"
        )
    return Members(offsets, members, int(shape[1]))


class _Matrix:
    """What a pickled ``csr_matrix`` turns into: its attributes, nothing else."""


def _integers(matrix: Any, name: str, path: Path) -> NDArray[np.int64]:
    array = getattr(matrix, name, None)
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise CorruptStoreError(
            f"{path} must hold the integer array '{name}' of a csr_matrix but does not; fetch it "
            "again"
        )
    return array.astype(np.int64)


def _text_to_bytes(text: str, encoding: str) -> bytes:
    # Protocol 2 writes the bytes of an array as text.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be written as latin1, got {encoding!r}")
    return text.encode("latin1")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: Any, order: str) -> NDArray[Any]:
    # Protocol 5 writes an array as its bytes.
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]


def _array(subtype: type, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    # An empty array, which the next step of the pickle fills; it never has another class or size.
    if subtype is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("an array must begin empty and of class ndarray")
    return np.ndarray.__new__(np.ndarray, (0,), dtype)


_ADMITTED: dict[str, tuple[tuple[str, ...], Callable[..., Any]]] = {
    "csr_matrix": (("scipy.sparse.csr", "scipy.sparse._csr", "scipy.sparse"), _Matrix),
    "csr_array": (("scipy.sparse._csr", "scipy.sparse"), _Matrix),
    "ndarray": (("numpy",), np.ndarray),
    "dtype": (("numpy",), np.dtype),
    "_reconstruct": (("numpy.core.multiarray", "numpy._core.multiarray"), _array),
    "_frombuffer": (("numpy.core.numeric", "numpy._core.numeric"), _from_buffer),
    "encode": (("_codecs",), _text_to_bytes),
}


class _Restricted(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        modules, stand_in = _ADMITTED.get(name, ((), None))
        if module not in modules:
            raise InputError(
                f"{self._path} must hold nothing but a sparse matrix of numbers, got the name "
                f"{module}.{name}; do not use this file"
            )
        return stand_in
