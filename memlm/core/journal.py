"""An append-only journal: one fsynced JSON line per finished piece of work.

The journal is the truth while something is being built. A crash can tear the last line; a torn
line was never finished, so it is dropped, and the next append starts on a line of its own.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from memlm.core.errors import StoreError
from memlm.core.files import sync_directory


class Journal:
    """One journal file. Appending is atomic between processes for lines under 4 KiB."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Add one record and return once it is on disk.

        Raises:
            StoreError: if the disk refuses the line.
        """
        line = json.dumps(record, separators=(",", ":")).encode()
        created = not self.path.exists()
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
            try:
                # The leading newline closes a line that an earlier crash may have torn.
                whole = b"\n" + line + b"\n"
                if os.write(descriptor, whole) < len(whole):
                    raise OSError(errno.ENOSPC, "the line was cut short")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if created:
                sync_directory(self.path.parent)
        except OSError as error:
            raise StoreError(
                f"{self.path} could not be written ({error.strerror or error}); free space or fix "
                "permissions, then run the same command to continue"
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """Every whole record, oldest first; torn lines and blank lines are left out."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):  # not begun, or another has just finished
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                continue
            if isinstance(record, dict):
                records.append(record)
        return records
