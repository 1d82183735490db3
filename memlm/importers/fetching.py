"""Where something to import lies: a path, an address, or the name of a published artefact.

Addresses are fetched into a folder and continued where they were cut (`memlm.core.download`);
archives (.tar, .tar.gz, .tar.bz2, .tar.xz) are unpacked beside it. Only plain files inside the
folder are taken out of an archive, and nothing of it is executed.
"""

import os
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

from memlm.core.config import check
from memlm.core.download import download, is_url
from memlm.core.errors import CorruptStoreError
from memlm.core.files import make_folder
from memlm.importers.artefacts import find_artefact

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_KEYS, _VALUES = "keys.npy", "vals.npy"


def default_folder() -> Path:
    """Where downloads are kept: ``memlm/downloads`` in the user's cache directory."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "memlm" / "downloads"


def locate(
    source: str,
    folder: str | Path | None = None,
    *,
    sha256: str | None = None,
    quiet: bool = False,
) -> Path:
    """A source as a path on this machine; fetched, if it has an address.

    Args:
        source: a path, an address, or the name of an artefact (`memlm.importers.artefacts`). With
            the address of a file of keys, the values beside it are fetched too.
        folder: for downloads; None: `default_folder`.
        sha256: of the file at the address; None: that of the artefact, if known.
        quiet: show no progress bar.

    Raises:
        InputError: if the server refuses the address, or an artefact has none.
        StoreError: if the connection is cut too often; the same call continues.
        CorruptStoreError: for another content than published, or a damaged archive.
    """
    size = None
    artefact = None if Path(source).exists() or is_url(source) else find_artefact(source)
    if artefact is not None:
        check(
            artefact.url is not None,
            f"{artefact.name} is published by its authors, but at no address that is known here; "
            f"fetch it from {artefact.where} and give the path or address of its files",
        )
        source, sha256, size = str(artefact.url), sha256 or artefact.sha256, artefact.bytes
    if not is_url(source):
        return Path(source)
    kept = Path(folder) if folder is not None else default_folder()
    parts = urlsplit(source)
    # one folder per place, so that files of one name do not meet
    kept = kept / parts.netloc.replace(":", "-") / Path(parts.path).parent.as_posix().strip("/")
    name = Path(parts.path).name
    check(bool(name), f"an address must name a file, got {source}")
    path = download(source, kept / name, sha256=sha256, size=size, quiet=quiet)
    if name.endswith(_KEYS):
        values = source.removesuffix(_KEYS) + _VALUES
        download(values, kept / (name.removesuffix(_KEYS) + _VALUES), quiet=quiet)
    return unpack(path) if name.endswith(_ARCHIVES) else path


def unpack(archive: Path) -> Path:
    """The checkpoint in an archive, or the folder it was unpacked into if there is none or several.

    Raises:
        CorruptStoreError: if it cannot be read, or reaches outside its folder.
    """
    folder = archive.with_name(archive.name.partition(".tar")[0].removesuffix(".tgz"))
    if not folder.is_dir():
        half = archive.with_name(f"{folder.name}.unpacking")
        make_folder(half)
        try:
            with tarfile.open(archive) as opened:
                opened.extractall(half, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise CorruptStoreError(
                f"{archive} must be an archive that can be unpacked, but {error}; remove it and "
                "fetch it again"
            ) from error
        os.replace(half, folder)
    checkpoints = sorted(folder.rglob("*.pt"))
    return checkpoints[0] if len(checkpoints) == 1 else folder
