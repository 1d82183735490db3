"""Rows that grow at the end: what was seen so far, appended to without copying it.

States are values: whoever holds an older one may go on from it. So rows are kept in a buffer that
is longer than they are, and several states share it, each with its own length:

    append to the longest state     writes behind it: amortised O(1) per position
    append to any other             copies: its continuation would overwrite the longer one's
    crop                            a smaller length, nothing else

A text of n tokens read one by one costs O(n) this way instead of O(n^2).
"""

from typing import Self

import torch
from torch import Tensor

_LEAST = 16  # positions of a first buffer


class _Buffer:
    """Columns ``(rows, capacity, ...)`` and how much of them is taken."""

    def __init__(self, columns: tuple[Tensor, ...], taken: int):
        self.columns, self.taken = columns, taken


class Growing:
    """Columns of one length, ``(rows, length, ...)`` each.

    Args:
        columns: what is there at first.
    """

    def __init__(self, *columns: Tensor):
        self._buffer = _Buffer(columns, columns[0].shape[1])
        self.length = columns[0].shape[1]

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Views of the columns, up to the length."""
        return tuple(column[:, : self.length] for column in self._buffer.columns)

    def append(self, *more: Tensor) -> Self:
        """The columns followed by ``more``, ``(rows, time, ...)`` each, on the columns' device."""
        buffer, end = self._buffer, self.length + more[0].shape[1]
        if buffer.taken != self.length or end > buffer.columns[0].shape[1]:
            buffer = self._longer(max(_LEAST, 2 * end))
        for column, new in zip(buffer.columns, more, strict=True):
            column[:, self.length : end] = new
        buffer.taken = end
        return self._on(buffer, end)

    def select(self, index: Tensor) -> Self:
        """The rows ``index``, copied."""
        return type(self)(*(column[index] for column in self.columns))

    def crop(self, length: int) -> Self:
        """The first ``length`` positions."""
        return self._on(self._buffer, length)

    def _longer(self, capacity: int) -> _Buffer:
        # a buffer that was made in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            columns = tuple(
                torch.empty(
                    (column.shape[0], capacity, *column.shape[2:]),
                    dtype=column.dtype,
                    device=column.device,
                )
                for column in self._buffer.columns
            )
        for longer, column in zip(columns, self.columns, strict=True):
            longer[:, : self.length] = column
        return _Buffer(columns, self.length)

    def _on(self, buffer: _Buffer, length: int) -> Self:
        twin = object.__new__(type(self))
        twin._buffer, twin.length = buffer, length
        return twin
