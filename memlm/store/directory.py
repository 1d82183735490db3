"""The directory of a store that is being built: made, compared, locked.

Locks are files under ``locks/``, held with the kernel's file locks: a process that dies in any way
lets go of them. They are removed with the last step of the build, so whoever fails to take one has
to look whether the store has become complete meanwhile.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from memlm.core.errors import FingerprintError, StoreError
from memlm.core.files import TEMPORARY
from memlm.store.codec import CODEC, CODEC_RECORD
from memlm.store.manifest import BUILD_LOG, JOURNAL, MANIFEST, Manifest, read_manifest

LOCKS = "locks"
_OWN = (MANIFEST, JOURNAL, BUILD_LOG, LOCKS, CODEC, CODEC_RECORD)
_WAIT_SECONDS = 60.0


def make_directory(path: Path) -> None:
    """Make ``path`` a directory to build in; one that holds other things is refused.

    Raises:
        StoreError: if it cannot be made, or holds files but no manifest.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [
            entry.name
            for entry in path.iterdir()
            if entry.name not in _OWN
            and not entry.name.endswith(TEMPORARY)
            and entry.name[0] != "."
        ]
    except OSError as error:
        raise not_writable(path, error) from error
    if others and not (path / MANIFEST).exists():
        raise StoreError(
            f"{path} must be a new or empty directory, or a datastore begun by this command, but "
            f"it holds {', '.join(sorted(others)[:3])}; choose another directory"
        )


def same_manifest(path: Path, here: Manifest) -> Manifest | None:
    """The manifest in ``path`` if it is of the same build as ``here``; None if there is none.

    Raises:
        FingerprintError: if it is of another identity or plan, naming what differs.
    """
    if not (path / MANIFEST).exists():
        return None
    there = read_manifest(path)
    if there.plan_fingerprint == here.plan_fingerprint:
        return there
    differences = here.identity.differences(there.identity)
    differences += [
        f"{name} is {getattr(here.info, name)!r} here and {getattr(there.info, name)!r} there"
        for name in ("metric", "places", "vocab_size")
        if getattr(here.info, name) != getattr(there.info, name)
    ]
    if here.ranges != there.ranges:
        differences.append(
            f"the plan has {len(here.ranges)} ranges of {len(here)} entries here and "
            f"{len(there.ranges)} of {len(there)} there"
        )
    raise FingerprintError(
        f"{path} holds a datastore with fingerprint {there.plan_fingerprint}, but this run has "
        f"{here.plan_fingerprint}: {'; '.join(differences)}; repeat the settings of the first run "
        "or choose another directory"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the whole store for a moment, waiting for others that do.

    Raises:
        StoreError: if the directory cannot be written, or another process does not let go.
    """
    try:
        with lock(path, "store").acquire(timeout=_WAIT_SECONDS):
            yield
    except Timeout as error:
        raise StoreError(
            f"{path} is locked by another process for over {_WAIT_SECONDS:.0f} seconds; wait for "
            "it or end it, then run the same command again"
        ) from error
    except OSError as error:
        raise not_writable(path, error) from error


@contextlib.contextmanager
def waiting(path: Path, name: str) -> Iterator[None]:
    """Hold one part of a store, however long others hold it.

    Raises:
        StoreError: if the directory cannot be written.
    """
    while True:
        try:
            held = lock(path, name)
            held.acquire()
            break
        except OSError as error:
            # a build that ends takes the locks away, also under the hands of those who wait
            if not (isinstance(error, FileNotFoundError) and path.is_dir()):
                raise not_writable(path, error) from error
    try:
        yield
    finally:
        held.release()


def lock(path: Path, name: str) -> FileLock:
    """The lock of one part of a store, not yet taken: a range or the whole."""
    (path / LOCKS).mkdir(exist_ok=True)
    return FileLock(path / LOCKS / f"{name}.lock")


def not_writable(path: Path, error: OSError) -> StoreError:
    """The error to raise when the disk refused something in ``path``."""
    return StoreError(
        f"{path} must be a directory that can be written ({error.strerror or error}); free space, "
        "fix permissions or choose another directory, then run the same command to continue"
    )
