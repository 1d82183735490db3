"""Calls to the disk that fail, or at which the process dies, when their time has come."""

import builtins
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FULL = OSError(28, "No space left on device")
READ_ONLY = OSError(30, "Read-only file system")
CALLS = {
    "open": (builtins, "open"),
    "file.write": (builtins, "open"),
    "os.open": (os, "open"),
    "os.write": (os, "write"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "link": (os, "link"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
}


class Counted:
    """A call that is counted where it concerns ``path``, and does ``act`` at the n-th time.

    Args:
        original: the call.
        path: only what lies below it counts.
        number: of the call at which to act, from 0; -1: never, -2: always.
        act: what happens instead of the call.
        after: what happens behind it.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        path: Path,
        number: int,
        act: Callable[[], Any] = lambda: None,
        after: Callable[[], Any] = lambda: None,
    ):
        self.original, self.path, self.number = original, str(path), number
        self.act, self.after, self.calls = act, after, 0

    def ours(self, target: Any) -> bool:
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return True
        return os.path.abspath(os.fspath(target)).startswith(self.path)

    def now(self, target: Any) -> bool:
        if not self.ours(target):
            return False
        self.calls += 1
        return self.number in (self.calls - 1, -2)

    def __call__(self, target: Any, *rest: Any, **options: Any) -> Any:
        now = self.now(target)
        if now:
            self.act()
        try:
            return self.original(target, *rest, **options)
        finally:
            if now:
                self.after()


class CountedWrites(Counted):
    """``open``, whose files count their writes."""

    def __call__(self, target: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        file = self.original(target, mode, *rest, **options)
        return _File(file, self, target) if {*mode} & {*"wax+"} and self.ours(target) else file


class _File:
    def __init__(self, file: Any, counted: Counted, target: Any):
        self._file, self._counted, self._target = file, counted, target

    def write(self, data: Any) -> Any:
        now = self._counted.now(self._target)
        if now:
            self._file.write(bytes(data)[: len(data) // 2])  # as a disk does that becomes full
            self._counted.act()
        result = self._file.write(data)
        if now:
            self._counted.after()
        return result

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def fail(error: OSError) -> Callable[[], Any]:
    def act():
        raise error

    return act


def die() -> None:
    """The end of the process as by a power cut: no handler runs."""
    os._exit(9)


@contextlib.contextmanager
def patched(name: str, path: Path, number: int = -1, **what: Any) -> Iterator[Counted]:
    """Count one kind of call below ``path`` inside the block, and act at its n-th."""
    place, attribute = CALLS[name]
    original = getattr(place, attribute)
    kind = CountedWrites if name == "file.write" else Counted
    counted = kind(original, path, number, **what)
    setattr(place, attribute, counted)
    try:
        yield counted
    finally:
        setattr(place, attribute, original)
