"""Datastores of the published programs: raw arrays without a header.

kNN-LM, RetoMaton, efficient-knnlm and TRIME write keys and values as bare memory maps named
``..._keys.npy`` and ``..._vals.npy``. Sizes and number formats are nowhere in the files; they are
inferred here from the file sizes and, where a program writes them there, from the names,

    dstore_gpt2_116988150_768_keys.npy              entries, width             (knn-transformers)
    dstore_size103225485_embed1024_fp16_keys.npy    entries, width, format     (efficient-knnlm)

and refused where more than one reading is left. Files that do have a NumPy header are read by it.

Values of two bytes were written as int16, where token ids above 32,767 became negative; they are
read as unsigned, which recovers ids up to 65,535.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError

_KEY_TYPES = {"float16": 2, "float32": 4}
_VALUE_TYPES = {2: np.dtype("<u2"), 4: np.dtype("<i4"), 8: np.dtype("<i8")}
_NUMPY = b"\x93NUMPY"
_BLOCK = 1 << 16


class Arrays(NamedTuple):
    """A foreign datastore, memory-mapped.

    Attributes:
        keys: ``(entries, dim)`` float16 or float32.
        values: ``(entries,)`` integers.
        weights: ``(entries,)`` integers of a merged store, or None.
    """

    keys: NDArray[np.floating]
    values: NDArray[np.integer]
    weights: NDArray[np.integer] | None


class Layout(NamedTuple):
    """How the files are to be read.

    Attributes:
        entries: rows.
        dim: width of a key.
        dtype: of the keys.
        value_bytes: per value.
    """

    entries: int
    dim: int
    dtype: str
    value_bytes: int


def find_files(path: Path) -> tuple[Path, Path]:
    """The files of keys and values that ``path`` means.

    Args:
        path: the file of keys, what comes before ``_keys.npy``, or a directory with one pair.

    Raises:
        InputError: if there is no pair, or more than one.
    """
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith("keys.npy"))
        check(
            len(found) == 1,
            f"{path} must hold one file named ...keys.npy, got {len(found)}; name the one to read",
        )
        path = found[0]
    elif not path.name.endswith("keys.npy"):
        path = path.with_name(f"{path.name}_keys.npy")
    values = path.with_name(path.name.removesuffix("keys.npy") + "vals.npy")
    for file in (path, values):
        check(file.is_file(), f"{file} must exist but does not; is the path right?")
    return path, values


def infer_layout(
    keys: Path,
    values: Path,
    *,
    entries: int | None = None,
    dim: int | None = None,
    dtype: str | None = None,
) -> Layout:
    """Sizes and formats of a pair of raw files.

    Args:
        keys: file of keys.
        values: file of values.
        entries: rows, if known.
        dim: width of a key, if known.
        dtype: ``"float16"`` or ``"float32"``, if known.

    Raises:
        InputError: if the sizes allow no reading, or several.
    """
    check(
        dtype is None or dtype in _KEY_TYPES,
        f"dtype must be one of {', '.join(_KEY_TYPES)}, got {dtype!r}",
    )
    named = _from_name(keys.name)
    entries, dim = entries or named[0], dim or named[1]
    dtype = dtype or named[2]
    size, value_size = keys.stat().st_size, values.stat().st_size
    found = []
    for width in _VALUE_TYPES:
        rows = value_size // width
        if value_size % width or rows == 0 or (entries is not None and rows != entries):
            continue
        for name, item in _KEY_TYPES.items():
            columns = size // (rows * item)
            fits = size == rows * columns * item and columns > 0
            if fits and dtype in (None, name) and dim in (None, columns):
                found.append(Layout(rows, columns, name, width))
    known = ", ".join(
        f"{label} {value}"
        for label, value in (("entries", entries), ("dim", dim), ("dtype", dtype))
        if value is not None
    )
    sizes = f"{keys.name} has {size:,} bytes and {values.name} {value_size:,}"
    check(
        len(found) > 0,
        f"the sizes of keys and values must fit, but {sizes}, which {known or 'nothing'} explains; "
        "one file is cut short, or the numbers given are not theirs",
    )
    readings = "; ".join(
        f"{one.entries:,} entries of {one.dim} {one.dtype} with values of {one.value_bytes} bytes"
        for one in found
    )
    check(
        len(found) == 1,
        f"the sizes of keys and values must allow one reading, but {sizes}: {readings}; give dim "
        "or dtype",
    )
    return found[0]


def read_arrays(
    path: str | Path,
    *,
    entries: int | None = None,
    dim: int | None = None,
    dtype: str | None = None,
) -> Arrays:
    """Open a foreign datastore without reading it into memory.

    Args:
        path: see `find_files`.
        entries: see `infer_layout`.
        dim: alike.
        dtype: alike.

    Raises:
        InputError: if files are missing or their sizes do not say what they are.
        CorruptStoreError: if files with a NumPy header do not fit together.
    """
    keys, values = find_files(Path(path))
    weights = keys.with_name(keys.name.removesuffix("keys.npy") + "weights.npy")
    if _has_header(keys):
        arrays = (np.load(keys, mmap_mode="r"), np.load(values, mmap_mode="r").reshape(-1))
        if arrays[0].ndim != 2 or len(arrays[0]) != len(arrays[1]):
            raise CorruptStoreError(
                f"{keys} must hold one row per value of {values.name}, got shapes "
                f"{arrays[0].shape} and {arrays[1].shape}; fetch them again"
            )
        return Arrays(*arrays, None)
    layout = infer_layout(keys, values, entries=entries, dim=dim, dtype=dtype)
    shape = (layout.entries, layout.dim)
    return Arrays(
        np.memmap(keys, np.dtype(layout.dtype), "r", shape=shape),
        np.memmap(values, _VALUE_TYPES[layout.value_bytes], "r", shape=(layout.entries,)),
        _weights(weights, layout.entries) if weights.is_file() else None,
    )


def unwritten(arrays: Arrays) -> int:
    """How many entries at the end are all zero: rows that the program never filled."""
    entries = len(arrays.values)
    for end in range(entries, 0, -_BLOCK):
        begin = max(0, end - _BLOCK)
        filled = np.flatnonzero(arrays.keys[begin:end].any(1) | (arrays.values[begin:end] != 0))
        if len(filled):
            return entries - (begin + int(filled[-1]) + 1)
    return entries


def _weights(file: Path, entries: int) -> NDArray[np.integer]:
    width, rest = divmod(file.stat().st_size, entries)
    if rest or width not in (4, 8):
        raise InputError(
            f"{file} must hold one weight of 4 or 8 bytes for each of {entries:,} entries, got "
            f"{file.stat().st_size:,} bytes; fetch it again"
        )
    return np.memmap(file, _VALUE_TYPES[width], "r", shape=(entries,))


def _from_name(name: str) -> tuple[int | None, int | None, str | None]:
    """Entries, width and format, as far as a file name says them."""
    dtype = "float16" if "fp16" in name else None
    if sizes := re.search(r"size(\d+)_embed(\d+)", name):
        return int(sizes[1]), int(sizes[2]), dtype
    if sizes := re.search(r"_(\d+)_(\d+)_keys\.npy$", name):
        return int(sizes[1]), int(sizes[2]), dtype
    return None, None, dtype


def _has_header(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(len(_NUMPY)) == _NUMPY
