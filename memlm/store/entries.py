"""Entries on their way to disk: converted to the stored formats, or refused with the first bad row.

Keys of large models overflow float16, and a datastore with one infinite key answers every query
with it, so nothing that is not finite is ever written. Token ids, documents and positions are
int32, which the original int16 files were not: ids above 32767 came back negative there.
"""

from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.store.manifest import Identity
from memlm.store.reader import TORCH_DTYPES

Column = Tensor | NDArray[Any]
"""Rows of entries, as a tensor on any device or a numpy array (memory maps too)."""

_LIMIT = 2**31
_BLOCK = 1 << 20


def stored_keys(label: str, keys: Column, rows: int, identity: Identity) -> Tensor:
    """Keys as a contiguous CPU tensor ``(rows, dim)`` of the store's dtype.

    Args:
        label: what they are, for messages.
        keys: ``(rows, dim)`` floating point.
        rows: how many there must be.
        identity: of the store, for ``dim`` and ``dtype``.

    Raises:
        InputError: if the shape differs or a key is not finite in the store's dtype.
    """
    given = torch.as_tensor(keys).detach()
    expected = (rows, identity.dim)
    check(
        tuple(given.shape) == expected and given.is_floating_point(),
        f"the {label} must be floating point of shape {expected}, got {given.dtype} of shape "
        f"{tuple(given.shape)}",
    )
    stored = given.to("cpu", TORCH_DTYPES[identity.dtype]).contiguous()
    finite = torch.isfinite(stored).all(dim=1)
    if not finite.all():
        bad = torch.nonzero(~finite).reshape(-1)
        if torch.isfinite(given[int(bad[0])]).all():
            reason = f"does not fit into {identity.dtype}; use bfloat16 or float32"
        else:
            reason = (
                "came as NaN or infinity; if they were converted from a wider format use bfloat16 "
                "or float32, else check the model's outputs on this text"
            )
        raise InputError(
            f"the {label} must be finite, but {len(bad)} of {rows} rows are not; the first of "
            f"them, row {int(bad[0])}, {reason}"
        )
    return stored


def stored_codes(label: str, codes: Column, rows: int, size: int) -> Tensor:
    """Codes as a contiguous CPU tensor ``(rows, size)`` uint8.

    Raises:
        InputError: if shape or type differs.
    """
    given = torch.as_tensor(codes)
    check(
        given.dtype == torch.uint8 and tuple(given.shape) == (rows, size),
        f"the {label} must be codes: uint8 of shape {(rows, size)}, got {given.dtype} of shape "
        f"{tuple(given.shape)}",
    )
    return given.cpu().contiguous()


def stored_integers(
    label: str, column: Column, rows: int, limit: int | None = None, *, lowest: int = 0
) -> Tensor:
    """Token ids, documents, positions or entries as an int32 CPU tensor ``(rows,)``.

    Args:
        label: what they are, for messages.
        column: ``(rows,)`` integers of any width.
        rows: how many there must be.
        limit: they must be below it; None: below ``2**31``.
        lowest: they must not be below it.

    Raises:
        InputError: if the shape or type differs, or one is out of range.
    """
    given = torch.as_tensor(column).detach()
    check(
        tuple(given.shape) == (rows,)
        and not given.is_floating_point()
        and not given.is_complex()
        and given.dtype != torch.bool,
        f"the {label} must be {rows} integers, got {given.dtype} of shape {tuple(given.shape)}",
    )
    largest = _LIMIT if limit is None else min(limit, _LIMIT)
    wide = given.to("cpu", torch.int64)
    bad = torch.nonzero((wide < lowest) | (wide >= largest)).reshape(-1)
    if len(bad):
        raise InputError(
            f"the {label} must lie between {lowest} and {largest - 1}, but {len(bad)} of {rows} do "
            f"not; the first of them is {int(wide[bad[0]])} in row {int(bad[0])}"
        )
    return wide.to(torch.int32)


def integers_hash(column: Column) -> str:
    """xxh3-128 of integers as little-endian int64, whatever their width: ``"xxh3_128:<hex>"``."""
    digest = xxhash.xxh3_128()
    for at in range(0, len(column), _BLOCK):
        block = np.asarray(in_memory(column[at : at + _BLOCK]).cpu()).astype("<i8")
        digest.update(np.ascontiguousarray(block).data)
    return f"xxh3_128:{digest.hexdigest()}"


def in_memory(column: Column) -> Tensor:
    """A slice as a tensor; numpy slices are copied, as torch refuses read-only memory maps."""
    return column if isinstance(column, Tensor) else torch.from_numpy(np.array(column))
