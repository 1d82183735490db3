"""Downloads against a server on this machine: cut, continued, changed, refused."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from memlm.core import download as module
from memlm.core.download import download
from memlm.core.errors import CorruptStoreError, InputError, StoreError

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves one file; what it does wrong is set on it."""

    content, tag, ranges, cut = CONTENT, '"one"', True, None

    def __init__(self):
        self.asked: list[str | None] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/keys.npy"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if self.path != "/keys.npy":
            self.send_error(404)
            return
        same = self.headers.get("If-Range") == server.tag
        begin = int(asked[len("bytes=") : -1]) if asked and same and server.ranges else 0
        if begin >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            end = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {begin}-{end}/{len(server.content)}")
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(server.content) - begin))
        self.end_headers()
        data = server.content[begin:]
        if server.cut is not None:  # the connection ends in the middle
            data = data[: server.cut]
            self.close_connection = True
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def digest(content):
    return hashlib.sha256(content).hexdigest()


def names(path):
    return sorted(file.name for file in path.iterdir())


def test_a_file_is_fetched_once(server, tmp_path):
    path = tmp_path / "folder" / "keys.npy"
    for _ in range(2):
        assert download(server.url, path, sha256=digest(CONTENT), size=len(CONTENT)) == path
        assert path.read_bytes() == CONTENT
    assert server.asked == [None]
    assert names(path.parent) == ["keys.npy"]


def test_a_cut_connection_is_continued(server, tmp_path):
    server.cut = 300_000
    path = download(server.url, tmp_path / "keys.npy", sha256=digest(CONTENT))
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_another_run_goes_on(server, tmp_path):
    server.cut = 100_000
    with pytest.raises(StoreError, match=r"cut off after 200,000 bytes.*to continue"):
        download(server.url, tmp_path / "keys.npy", attempts=2)
    assert names(tmp_path) == ["keys.npy.part", "keys.npy.part.json"]
    server.cut = None
    path = download(server.url, tmp_path / "keys.npy", sha256=digest(CONTENT))
    assert path.read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=200000-"
    assert names(tmp_path) == ["keys.npy"]


@pytest.mark.parametrize("why", ["no ranges", "no tag", "weak tag", "another version"])
def test_what_cannot_be_continued_begins_anew(why, server, tmp_path):
    server.cut = 100_000
    server.tag = {"no tag": None, "weak tag": 'W/"one"'}.get(why, server.tag)
    with pytest.raises(StoreError):
        download(server.url, tmp_path / "keys.npy", attempts=1)
    server.cut, server.ranges = None, why != "no ranges"
    if why == "another version":
        server.tag, server.content = '"two"', CONTENT[::-1]
    path = download(server.url, tmp_path / "keys.npy")
    assert path.read_bytes() == server.content


def test_all_bytes_had_arrived(server, tmp_path):
    server.cut = 0
    with pytest.raises(StoreError):
        download(server.url, tmp_path / "keys.npy", attempts=1)
    server.cut = None
    (tmp_path / "keys.npy.part").write_bytes(CONTENT)
    assert download(server.url, tmp_path / "keys.npy").read_bytes() == CONTENT
    assert server.asked[-1] == f"bytes={len(CONTENT)}-"


@pytest.mark.parametrize("expected", [{"sha256": digest(b"x")}, {"size": 5}])
def test_a_wrong_content_is_not_kept(expected, server, tmp_path):
    with pytest.raises(CorruptStoreError, match="must have"):
        download(server.url, tmp_path / "keys.npy", **expected)
    assert names(tmp_path) == []
    (tmp_path / "keys.npy").write_bytes(b"something else")
    with pytest.raises(CorruptStoreError, match="must have"):
        download(server.url, tmp_path / "keys.npy", **expected)
    assert names(tmp_path) == ["keys.npy"]


def test_refusals(server, tmp_path):
    with pytest.raises(InputError, match="the server says 404"):
        download(server.url.replace("keys", "values"), tmp_path / "x")
    with pytest.raises(InputError, match="must begin with http"):
        download("file:///etc/passwd", tmp_path / "x")
    unreachable = "http://127.0.0.1:9/keys.npy"
    with pytest.raises(StoreError, match="cut off after 0 bytes"):
        download(unreachable, tmp_path / "x", attempts=2)
