"""Fetching large files over HTTP: continued where it was cut, checked, and whole or absent.

Bytes arrive in ``NAME.part``, beside a note that says which version of the file they are of (the
server's ETag or date). The next attempt asks for the rest of that very version (RFC 9110, Range and
If-Range); a server that cannot do this, or has another version by now, sends all of it and the
download begins anew. What has arrived gets its name only after its checksum was compared.
"""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.core.files import make_folder, read_json, remove, sync_directory, write_json
from memlm.core.progress import bar

_BLOCK = 1 << 20
_TIMEOUT_SECONDS = 60.0
_PAUSE_SECONDS = 1.0


def is_url(source: str) -> bool:
    """Whether a source is an address to be fetched, not a path."""
    return source.startswith(("http://", "https://"))


def download(
    url: str,
    path: str | Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    attempts: int = 5,
    quiet: bool = False,
) -> Path:
    """Fetch a file, or the rest of it; one that is there and is what it should be is left alone.

    Args:
        url: an http or https address.
        path: of the file; its directory is made.
        sha256: of the content, in hexadecimal; None: not checked.
        size: of the file in bytes; None: what the server says.
        attempts: connections that may be cut before giving up; those that brought nothing count.
        quiet: show no progress bar.

    Returns:
        ``path``.

    Raises:
        InputError: if the address is none, or the server refuses it.
        StoreError: if the connection is cut too often, or the disk refuses; run the same call again
            to continue.
        CorruptStoreError: if the content is not what ``sha256`` or ``size`` say.
    """
    path = Path(path)
    check(is_url(url), f"an address must begin with http:// or https://, got {url!r}")
    if path.is_file():
        _compare(path, url, sha256, size)
        return path
    make_folder(path.parent)
    fetch = _Fetch(url, path, quiet)
    while True:
        try:
            fetch.go_on()
            break
        except urllib.error.HTTPError as error:
            raise InputError(
                f"{url} must be a file that can be fetched, but the server says {error.code} "
                f"({error.reason}); is the address right?"
            ) from error
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as error:
            attempts -= 1
            if attempts <= 0:
                raise StoreError(
                    f"{url} was cut off after {fetch.done:,} bytes ({error}); check the connection "
                    "and run the same command to continue"
                ) from error
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            raise StoreError(
                f"{fetch.part} could not be written ({error.strerror or error}); free space or fix "
                "permissions, then run the same command to continue"
            ) from error
    try:
        _compare(fetch.part, url, sha256, size)
    except CorruptStoreError:
        fetch.forget()  # going on from wrong bytes would never end well
        raise
    os.replace(fetch.part, path)
    remove(fetch.note)
    sync_directory(path.parent)
    return path


class _Fetch:
    """A download that may take several connections."""

    def __init__(self, url: str, path: Path, quiet: bool):
        self.url, self.quiet = url, quiet
        self.part = path.with_name(f"{path.name}.part")
        self.note = path.with_name(f"{path.name}.part.json")

    @property
    def done(self) -> int:
        """Bytes that are there."""
        return self.part.stat().st_size if self.part.exists() else 0

    def forget(self) -> None:
        """Begin anew the next time."""
        remove(self.part)
        remove(self.note)

    def go_on(self) -> None:
        """One connection, to the end of the file.

        Raises:
            ConnectionError: if it is cut before.
        """
        version = self._version()
        if version is None:
            self.forget()
        headers = {} if version is None else {"Range": f"bytes={self.done}-", "If-Range": version}
        headers["Accept-Encoding"] = "identity"
        request = urllib.request.Request(self.url, headers=headers)
        try:
            answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{self.done}":
                return  # nothing is left to send
            if error.code == 416:
                self.forget()
                raise ConnectionError("the part that is there does not belong to it") from error
            raise
        with answer:
            self._receive(answer)

    def _receive(self, answer: Any) -> None:
        begin = self._first_byte(answer)
        if begin != self.done:
            self.forget()
        length = answer.headers.get("Content-Length")
        total = None if length is None else begin + int(length)
        if not self.note.exists():
            version = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
            # A weak tag does not promise the same bytes.
            version = None if version is None or version.startswith("W/") else version
            write_json(self.note, {"url": self.url, "version": version})
        with (
            open(self.part, "ab" if begin else "wb") as file,
            bar(total, label="fetch", unit="B", initial=begin, quiet=self.quiet) as shown,
        ):
            try:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    shown.update(len(block))
            finally:
                file.flush()
                os.fsync(file.fileno())
        if total is not None and self.done < total:
            raise ConnectionError(f"{total:,} bytes were promised")

    def _first_byte(self, answer: Any) -> int:
        """Where the server begins: at the byte that was asked for, or at the first."""
        if answer.status != http.client.PARTIAL_CONTENT:
            return 0
        given = answer.headers.get("Content-Range", "")
        if not given.startswith(f"bytes {self.done}-"):
            self.forget()
            raise ConnectionError(f"the server sent {given!r} instead of the rest")
        return self.done

    def _version(self) -> str | None:
        """Of what is there; None if it cannot be continued."""
        if not (self.part.exists() and self.note.exists()):
            return None
        note = read_json(self.note)
        return note.get("version") if note.get("url") == self.url else None


def _compare(path: Path, url: str, sha256: str | None, size: int | None) -> None:
    found = path.stat().st_size
    if size is not None and found != size:
        raise CorruptStoreError(
            f"{url} must have {size:,} bytes, but {path} has {found:,}; remove it and fetch it "
            "again, or ask whoever published it"
        )
    if sha256 is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256.lower():
        raise CorruptStoreError(
            f"{url} must have the sha256 {sha256}, but {path} has {digest.hexdigest()}; remove it "
            "and fetch it again, or ask whoever published it"
        )
