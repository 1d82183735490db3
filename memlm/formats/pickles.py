"""The one restricted unpickler: a pickle may build plain values, and call nothing else.

A pickle may name any function of any module and have it called. `RestrictedUnpickler` looks every
name up in a table of what is admitted and never imports one. Names of a few modules may be made
*inert*: they become empty classes that swallow whatever the pickle does with them, so that a file
can be read although it also holds objects of programs that are not installed. Every other name is
refused before anything happens.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from memlm.core.errors import InputError

# name -> (modules it may come from, what stands for it)
Admitted = Mapping[str, tuple[tuple[str, ...], Any]]


class Inert:
    """Stands for an object of a program that is not there; keeps its arguments, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """What a pickle does with lists."""

    def extend(self, values: Any) -> None:
        """Alike."""


class RestrictedUnpickler(pickle.Unpickler):
    """Reads a pickle of admitted names.

    Args:
        file: open for reading.
        path: of it, for messages.
        admitted: names, their modules and stand-ins.
        holds: what the file must consist of, for messages.
        inert: modules, with all below them, whose names become `Inert`.
        kwargs: for `pickle.Unpickler`.
    """

    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        admitted: Admitted,
        holds: str,
        inert: tuple[str, ...] = (),
        **kwargs: Any,
    ):
        super().__init__(file, **kwargs)
        self._path, self._admitted, self._holds, self._inert = path, admitted, holds, inert

    def find_class(self, module: str, name: str, /) -> Any:
        """What stands for a name.

        Raises:
            InputError: if it is not admitted.
        """
        modules, stand_in = self._admitted.get(name, ((), None))
        if module in modules:
            return stand_in
        if module.split(".")[0] in self._inert:
            return type(name, (Inert,), {})
        raise InputError(
            f"{self._path} must hold nothing but {self._holds}, got the name {module}.{name}; do "
            "not use this file"
        )


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


def _scalar(dtype: np.dtype, data: Any) -> Any:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype)[0]


_Function = Callable[..., Any]
ARRAYS: dict[str, tuple[tuple[str, ...], _Function]] = {
    "ndarray": (("numpy",), np.ndarray),
    "dtype": (("numpy",), np.dtype),
    "_reconstruct": (("numpy.core.multiarray", "numpy._core.multiarray"), _array),
    "scalar": (("numpy.core.multiarray", "numpy._core.multiarray"), _scalar),
    "_frombuffer": (("numpy.core.numeric", "numpy._core.numeric"), _from_buffer),
    "encode": (("_codecs",), _text_to_bytes),
}
