"""Clusters in the published files: a pickled sparse matrix, read without running a pickle.

knn-transformers and the fairseq version of RetoMaton keep clusters as a pickled
``scipy.sparse.csr_matrix`` of ones, one row per cluster and one column per entry. Only the handful
of names that such a matrix consists of are admitted (see `memlm.formats.pickles`), under their old
and new module paths: the matrix becomes a plain holder of its attributes (so SciPy is not needed),
arrays and number formats are NumPy's own.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.pickles import ARRAYS, Admitted, RestrictedUnpickler


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
            matrix = RestrictedUnpickler(file, path, _ADMITTED, "a sparse matrix of numbers").load()
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


_ADMITTED: Admitted = {
    "csr_matrix": (("scipy.sparse.csr", "scipy.sparse._csr", "scipy.sparse"), _Matrix),
    "csr_array": (("scipy.sparse._csr", "scipy.sparse"), _Matrix),
    **ARRAYS,
}
