"""Files that are either whole or absent: write beside, flush, fsync, rename, fsync the directory.

A reader never sees a half-written file under its final name, whatever dies when. Names that end
in ``.tmp`` are leftovers and are ignored. Every step that can fail (``os.open``, ``os.fsync``,
``os.replace``) is reached through the ``os`` module, so a test can make each one fail in turn.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from memlm.core.errors import CorruptStoreError, StoreError

TEMPORARY = ".tmp"
_BLOCK = 1 << 20


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace ``path`` so that it is complete or unchanged, also through a power cut.

    Args:
        path: the final name; its directory exists.
        write: called once with the open temporary file.

    Raises:
        StoreError: if the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{path} could not be written ({error.strerror or error}); nothing half-written was "
            "left behind: free space or fix permissions, then run the same command to continue"
        ) from error


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` atomically as indented JSON with a final newline."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        CorruptStoreError: if the file is missing or is not one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CorruptStoreError(f"{path} must exist but does not; is the path right?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptStoreError(f"{path} must hold JSON but does not parse ({error})") from error
    if not isinstance(value, dict):
        raise CorruptStoreError(f"{path} must hold one JSON object, got {type(value).__name__}")
    return value


def checksum(path: Path) -> str:
    """xxh3-128 of the file's bytes, as ``"xxh3_128:<hex>"``.

    Raises:
        CorruptStoreError: if it cannot be read.
    """
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise CorruptStoreError(
            f"{path} cannot be read ({error.strerror or error}); check the disk, then run the same "
            "command again"
        ) from error
    return f"xxh3_128:{digest.hexdigest()}"


def make_folder(path: Path) -> None:
    """Make a directory and those above it, if they are not there.

    Raises:
        StoreError: if it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{path} must be a directory that can be written ({error.strerror or error}); free "
            "space, fix permissions or choose another directory, then run the same command again"
        ) from error


def fingerprint(value: Any) -> str:
    """xxh3-128 of a plain JSON value in canonical form: equal values, equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return f"xxh3_128:{xxhash.xxh3_128(text.encode()).hexdigest()}"


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that never changes a second name; where that cannot be, copy it.

    A second name (hard link) takes no space and no time, and each name may be removed on its own.
    Between file systems the kernel copies, sharing blocks where it can.

    Args:
        source: a finished file.
        target: the other name; replaced if it is there.

    Raises:
        StoreError: if neither is possible.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            _copy(source, temporary)
        os.replace(temporary, target)
        # a rename between two names of one file does nothing and leaves both
        temporary.unlink(missing_ok=True)
        sync_directory(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"{target} could not be made of {source} ({error.strerror or error}); free space or "
            "fix permissions, then run the same command to continue"
        ) from error


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as read, open(target, "wb") as written:
        left = os.fstat(read.fileno()).st_size
        try:
            while left > 0:
                left -= os.copy_file_range(read.fileno(), written.fileno(), left)
        except (AttributeError, OSError):  # not on this system, or not between these two
            read.seek(0)
            written.seek(0)
            written.truncate()
            shutil.copyfileobj(read, written, _BLOCK)
        written.flush()
        os.fsync(written.fileno())


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        StoreError: if it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"{path} could not be removed ({error.strerror or error}); fix permissions, then run "
            "the same command to continue"
        ) from error


def sync_directory(path: Path) -> None:
    """fsync a directory, which makes renames inside it durable (a no-op where unsupported)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Remove leftover ``*.tmp`` files of dead writers."""
    for leftover in directory.glob(f"*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)
