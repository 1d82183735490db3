"""The state of a memory in a file: to stop reading a text, and go on another day.

A state is plain tensors in tuples, so it is written as one safetensors file, beside what the memory
is, and read into the state of a memory of the same settings. Nothing is ever unpickled.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import FingerprintError, InputError
from memlm.core.files import write_atomic
from memlm.core.types import TokenMemory
from memlm.memory.growing import Growing

_ROWS, _MEMORY = "rows", "memory"


def save_state(memory: TokenMemory, state: Any, path: str | Path) -> None:
    """Write the state of a memory.

    Args:
        memory: whose state it is: `LocalMemory`, `LongMemory` or a `Together` of these and of
            memories without state.
        state: from ``init_state`` or any call after it.
        path: of the file.

    Raises:
        InputError: if the state is not made of tensors.
    """
    tensors: dict[str, Tensor] = {}
    _flatten(state, "state", tensors)
    if not tensors:
        raise InputError(f"only a memory with state has something to save, got {memory.describe()}")
    rows = str(len(next(iter(tensors.values()))))
    about = {_ROWS: rows, _MEMORY: json.dumps(memory.describe())}
    data = save({name: part.contiguous() for name, part in tensors.items()}, metadata=about)
    write_atomic(Path(path), lambda file: file.write(data))


def load_state(memory: TokenMemory, path: str | Path) -> Any:
    """The state that `save_state` wrote.

    Args:
        memory: with the settings of the one that was saved.
        path: of the file.

    Raises:
        InputError: if there is no such file, or it holds no state.
        FingerprintError: if it is the state of another memory.
    """
    check(Path(path).is_file(), f"the state must be a file that save_state wrote, got {path}")
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(
            f"{path} must be a file that save_state wrote, but cannot be read ({error}); save the "
            "state again"
        ) from error
    with opened as file:
        about = file.metadata() or {}
        check(
            _MEMORY in about and _ROWS in about,
            f"{path} must be a file that save_state wrote, but does not say of which memory; save "
            "the state again",
        )
        saved, given = json.loads(about[_MEMORY]), json.loads(json.dumps(memory.describe()))
        if saved != given:
            raise FingerprintError(
                f"{path} holds the state of {saved}, got {given}; make the memory with the "
                "settings that were saved"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return _restore(memory.init_state(int(about[_ROWS])), "state", tensors)


def _flatten(state: Any, name: str, into: dict[str, Tensor]) -> None:
    if isinstance(state, Tensor):
        into[name] = state
    elif isinstance(state, Growing | tuple):
        for number, part in enumerate(_parts(state)):
            _flatten(part, f"{name}.{number}", into)
    elif state is not None:
        raise InputError(
            f"a state that is saved must be made of tensors, got a {type(state).__name__}"
        )


def _restore(like: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The tensors in the shape of another state of the same memory."""
    if isinstance(like, Tensor):
        return tensors[name]
    if like is None:
        return None
    parts = [
        _restore(part, f"{name}.{number}", tensors) for number, part in enumerate(_parts(like))
    ]
    if isinstance(like, Growing) or hasattr(like, "_fields"):
        return type(like)(*parts)
    return tuple(parts)


def _parts(state: Any) -> tuple[Any, ...]:
    return state.columns if isinstance(state, Growing) else tuple(state)
