"""Published corpora by name, byte for byte: WikiText and enwik8, with their published splits.

    wikitext-2, wikitext-103           tokenised text of Merity et al. (2017), one document per
                                       article; every line ends with a line break, so with a
                                       word-level vocabulary whose line break is a token counts are
                                       the published ones (wikitext-2: 217,646 and 245,569 tokens
                                       of validation and test)
    wikitext-2-raw, wikitext-103-raw   the same articles as they were written
    enwik8                             the first 10^8 bytes of English Wikipedia of 2006 (Hutter),
                                       cut after 90 and 95 million bytes; a cut inside a character
                                       moves to the next one

WikiText comes as parquet files of one revision of ``Salesforce/wikitext`` through ``datasets``,
enwik8 from its zip, whose content must have the known checksum. Both are fetched once.
"""

import hashlib
import os
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from memlm.core.config import check
from memlm.core.download import download
from memlm.core.errors import InputError, MemlmError
from memlm.core.files import write_atomic
from memlm.data.documents import Document

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

WIKITEXT = "hf://datasets/Salesforce/wikitext@b08601e04326c79dfdd32d625aee71d232d685c3"
_WIKITEXT = {
    "wikitext-2": "wikitext-2-v1",
    "wikitext-2-raw": "wikitext-2-raw-v1",
    "wikitext-103": "wikitext-103-v1",
    "wikitext-103-raw": "wikitext-103-raw-v1",
}
PUBLISHED = (*_WIKITEXT, "enwik8")
_TITLE = re.compile(r"^ = [^=].*[^=] = $")  # of an article; sections have more signs


class Archive(NamedTuple):
    """A zip with one file in it that is a corpus.

    Attributes:
        url: where it is.
        member: the file inside.
        sha256: of that file.
        cuts: where validation and test begin, in bytes.
    """

    url: str
    member: str
    sha256: str
    cuts: tuple[int, int]


ENWIK8 = Archive(
    url="https://mattmahoney.net/dc/enwik8.zip",
    member="enwik8",
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    cuts=(90_000_000, 95_000_000),
)


def read_published(name: str, split: str = "train") -> Iterator[Document]:
    """The documents of a published corpus.

    Args:
        name: see the module.
        split: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        InputError: for an unknown name or split, or if the corpus cannot be fetched or is not the
            published one.
    """
    check(name in PUBLISHED, f"there is no corpus {name!r}; there are {', '.join(PUBLISHED)}")
    check(split in SPLITS, f"a split must be one of {', '.join(SPLITS)}, got {split!r}")
    if name == "enwik8":
        return iter([read_archive(ENWIK8, split)])
    return read_wikitext(_WIKITEXT[name], split)


def read_wikitext(config: str, split: str, *, source: str = WIKITEXT) -> Iterator[Document]:
    """Articles of one of WikiText's configurations, from its parquet files.

    Args:
        config: the folder of its files, e.g. ``"wikitext-103-v1"``.
        split: which files.
        source: what holds the folder: a revision of the Hub, a path or an address.

    Raises:
        InputError: if the files cannot be fetched.
    """
    import datasets

    files = f"{source}/{config}/{split}-*.parquet"
    try:
        rows = datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{files} must be readable, but {error}; check the connection, or download the files "
            "and give their folder as text"
        ) from error
    return _articles(line for line in rows["text"])


def read_archive(archive: Archive, split: str, *, cache: Path | None = None) -> Document:
    """One part of a corpus in a zip, fetched once and checked.

    Args:
        archive: which.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        cache: where it is kept; None: ``memlm`` in the user's cache directory.

    Raises:
        InputError: if it cannot be fetched or is not the published file.
    """
    kept = (cache or _cache()) / archive.member
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        content = _unpacked(archive, kept.with_name(f"{archive.member}.zip"))
        write_atomic(kept, lambda file: file.write(content))
    content = kept.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    check(
        found == archive.sha256,
        f"{kept} must have the sha256 {archive.sha256}, but has {found}; remove it to fetch it "
        "again",
    )
    bounds = [0, *(_next_character(content, cut) for cut in archive.cuts), len(content)]
    part = SPLITS.index(split)  # type: ignore[arg-type]
    text = content[bounds[part] : bounds[part + 1]].decode("utf-8")
    return Document(f"{archive.member}:{split}", text)


def _unpacked(archive: Archive, path: Path) -> bytes:
    """The content of the zip at ``archive.url``; the zip itself is not kept."""
    try:
        with zipfile.ZipFile(download(archive.url, path)) as packed:
            return packed.read(archive.member)
    except (MemlmError, OSError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"{archive.url} must be a zip with {archive.member} in it, but {error}; check the "
            "connection and try again"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _next_character(content: bytes, place: int) -> int:
    """The first place from ``place`` on where a UTF-8 character begins."""
    while place < len(content) and content[place] & 0xC0 == 0x80:
        place += 1
    return place


def _articles(lines: Iterable[str]) -> Iterator[Document]:
    """Lines joined to articles, each beginning with its title."""
    title, held = "", []
    for line in lines:
        # In parquet an empty line is an empty string, and a line has its break.
        line = line.rstrip("\n")
        if _TITLE.match(line):
            if any(map(str.strip, held)):
                yield Document(title, "".join(held))
                held = []
            title = line.strip(" =")
        held.append(line + "\n")
    if held:
        yield Document(title, "".join(held))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memlm"
