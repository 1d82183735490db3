"""Published corpora: fetched once, checked, cut where they are always cut; small copies here."""

import hashlib
import http.server
import threading
import zipfile
from functools import partial

import datasets
import pytest

from memlm.core.errors import InputError
from memlm.data.published import (
    ENWIK8,
    Archive,
    read_archive,
    read_published,
    read_wikitext,
)

LINES = [
    "",
    " = Homarus gammarus = \n",
    "",
    " The <unk> lobster . \n",
    " = = Description = = \n",
    " Blue . \n",
    " = Other = \n",
    " Nothing . \n",
]


@pytest.fixture
def served(tmp_path):
    """A folder and the address at which it is served; requests are counted."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served"))
    )
    (tmp_path / "served").mkdir()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_articles_begin_with_their_title(tmp_path):
    folder = tmp_path / "wikitext-2-v1"
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"text": LINES})
    rows.to_parquet(folder / "test-00000-of-00001.parquet")
    found = list(read_wikitext("wikitext-2-v1", "test", source=str(tmp_path)))
    assert [document.name for document in found] == ["Homarus gammarus", "Other"]
    text = "".join(document.text for document in found)
    assert text.count("\n") == len(LINES)
    assert found[0].text.startswith("\n = Homarus gammarus = \n\n The <unk>")
    with pytest.raises(InputError, match="must be readable, but"):
        read_wikitext("wikitext-2-v1", "train", source=str(tmp_path))


def archive_of(folder, url, content, **changes):
    with zipfile.ZipFile(folder / "small.zip", "w") as packed:
        packed.writestr("small", content)
    digest = hashlib.sha256(content).hexdigest()
    return Archive(f"{url}/small.zip", "small", digest, (6, 9))._replace(**changes)


def test_an_archive_is_fetched_once_and_cut_between_characters(served, tmp_path):
    folder, url, requests = served
    content = "abcdeéfghij".encode()  # the cut at 6 falls inside é
    archive = archive_of(folder, url, content)
    parts = [
        read_archive(archive, split, cache=tmp_path / "cache").text
        for split in ("train", "validation", "test")
    ]
    assert parts == ["abcdeé", "fg", "hij"]
    assert requests == ["/small.zip"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["small"]


def test_another_file_is_refused(served, tmp_path):
    folder, url, _ = served
    archive = archive_of(folder, url, b"0123456789", sha256="0" * 64)
    with pytest.raises(InputError, match="must have the sha256 000"):
        read_archive(archive, "train", cache=tmp_path / "cache")
    (folder / "small.zip").write_bytes(b"no zip")
    for address in (archive.url, f"{url}/none.zip"):
        with pytest.raises(InputError, match="must be a zip with small in it"):
            read_archive(archive._replace(url=address), "train", cache=tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_the_published_cuts_of_enwik8():
    assert ENWIK8.cuts == (90_000_000, 95_000_000)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no corpus 'wikitext-4'; there are wikitext-2"):
        read_published("wikitext-4")
    with pytest.raises(InputError, match="one of train, validation, test"):
        read_published("enwik8", "dev")
