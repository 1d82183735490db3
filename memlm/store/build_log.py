"""The build log: when, where and with which versions a store was made; outside its identity."""

import contextlib
import os
import platform
import socket
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memlm.core.journal import Journal
from memlm.store.manifest import BUILD_LOG


def note(path: Path, event: str, **details: Any) -> None:
    """Add a line to the build log of the store in ``path``.

    Raises:
        StoreError: if the disk refuses the line.
    """
    Journal(path / BUILD_LOG).append(
        {
            "event": event,
            **details,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            **_versions(),
        }
    )


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("memlm", "torch", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):  # memlm run from a folder has no version
            found[name] = version(name)
    return found
