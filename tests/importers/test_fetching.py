"""Imports by address, name and from the Hub; the server is on this machine, the Hub a folder."""

import functools
import http.server
import json
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from memlm.cli.main import main
from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.importers.artefacts import ARTEFACTS, find_artefact, table
from memlm.importers.fetching import locate, unpack
from memlm.importers.hub import fetch_store, hub_name, push_store
from memlm.store.arrays import save_arrays
from memlm.store.deleted import delete_documents
from memlm.store.reader import Datastore
from tests.importers.test_datastore import write

PAGE = Path(__file__).parents[2] / "docs" / "importing.md"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and its address."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_store_is_imported_by_address(served, tmp_path, capsys):
    folder, address = served
    keys, values = write(folder)
    url = f"{address}/dstore_6_4_keys.npy"
    command = ["import", url, "--out", str(tmp_path / "store"), "--downloads", str(tmp_path / "d")]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 6
    store = Datastore.open(tmp_path / "store")
    assert torch.equal(store.load_keys(), torch.from_numpy(keys))
    assert store.values.tolist() == values.tolist()
    shutil.rmtree(folder)  # what was fetched is not fetched again
    assert main(command) == 0


def test_a_wrong_checksum_is_refused(served, tmp_path, capsys):
    folder, address = served
    write(folder)
    url = f"{address}/dstore_6_4_keys.npy"
    command = ["import", url, "--out", str(tmp_path / "s"), "--downloads", str(tmp_path / "d")]
    assert main([*command, "--sha256", "0" * 64]) == 2
    assert "must have the sha256 0000" in capsys.readouterr().err
    assert main(["import", f"{address}/none.pt", *command[2:]]) == 2
    assert "the server says 404" in capsys.readouterr().err


def test_an_archive_is_unpacked_to_its_checkpoint(served, tmp_path):
    folder, address = served
    (folder / "model.pt").write_bytes(b"weights")
    (folder / "dict.txt").write_text("a 1\n")
    with tarfile.open(folder / "lm.tar.gz", "w:gz") as archive:
        for name in ("model.pt", "dict.txt"):
            archive.add(folder / name, f"lm/{name}")
    for _ in range(2):
        path = locate(f"{address}/lm.tar.gz", tmp_path / "d")
        assert path.name == "model.pt"
        assert path.with_name("dict.txt").read_text() == "a 1\n"


def test_an_archive_that_reaches_outside_is_refused(tmp_path):
    (tmp_path / "x").write_text("x")
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(tmp_path / "x", "../../escaped")
    with pytest.raises(CorruptStoreError, match=r"outside|unpacked"):
        unpack(tmp_path / "bad.tar")
    (tmp_path / "cut.tar.gz").write_bytes(b"\x1f\x8b\x08nothing")
    with pytest.raises(CorruptStoreError, match="must be an archive"):
        unpack(tmp_path / "cut.tar.gz")


# --- published artefacts


def test_the_table_is_in_the_documentation():
    assert "\n".join(table()) in PAGE.read_text(encoding="utf-8")


def test_names_and_sizes():
    names = [one.name for one in ARTEFACTS]
    assert len(set(names)) == len(names)
    sizes = {one.name: one.bytes for one in ARTEFACTS}
    assert sizes["wt103-keys"] == 211_405_793_280
    assert sizes["gpt2-values"] == 467_952_600
    with pytest.raises(InputError, match="needs no import"):
        find_artefact("gpt2-wikitext103")
    with pytest.raises(InputError, match="at no address that is known here"):
        locate("wt103-keys")
    assert find_artefact("something else") is None


def test_an_artefact_with_an_address_is_fetched(served, tmp_path, monkeypatch):
    folder, address = served
    (folder / "model.pt").write_bytes(b"weights")
    known = ARTEFACTS[0]._replace(url=f"{address}/model.pt", bytes=7)
    monkeypatch.setattr("memlm.importers.artefacts.ARTEFACTS", (known,))
    assert locate(known.name, tmp_path / "d").read_bytes() == b"weights"
    wrong = known._replace(bytes=8)
    monkeypatch.setattr("memlm.importers.artefacts.ARTEFACTS", (wrong,))
    with pytest.raises(CorruptStoreError, match="must have 8 bytes"):
        locate(known.name, tmp_path / "d")


# --- the Hub


class Hub:
    """What HfApi does with a dataset repository, in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        return self

    def create_repo(self, name, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        self.calls.append(("create", name, private))
        (self.folder / name).mkdir(parents=True, exist_ok=True)

    def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id, repo_type, revision):
        (self.folder / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(
        self, *, repo_id, folder_path, repo_type, revision, ignore_patterns, commit_message
    ):
        files = [str(file.relative_to(folder_path)) for file in folder_path.rglob("*")]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            if (folder_path / name).is_file():
                target = self.folder / repo_id / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder_path / name, target)
        return f"commit of {repo_id}"

    def download(self, name, *, repo_type, revision, local_dir, token):
        if not (self.folder / name).is_dir():
            raise OSError(f"404: no repository {name}")
        if local_dir is None:
            return str(self.folder / name)
        shutil.copytree(self.folder / name, local_dir, dirs_exist_ok=True)
        return str(local_dir)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


@pytest.fixture
def store(tmp_path):
    draw = np.random.default_rng(0)
    store = save_arrays(
        tmp_path / "store",
        draw.normal(size=(20, 4)).astype("float16"),
        draw.integers(0, 9, 20),
        documents=np.arange(20) // 10,
        positions=np.arange(20) % 10,
        model="gpt2",
    )
    return delete_documents(store, [1])


def test_a_store_goes_to_the_hub_and_comes_back(store, hub, tmp_path, capsys):
    assert main(["push", str(store.path), "someone/books", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "commit of someone/books"
    assert hub.calls == [("create", "someone/books", True)]
    there = {file.name for file in (hub.folder / "someone/books").iterdir()}
    assert "README.md" in there
    assert not there & {"build-log.jsonl", "locks", "journal.jsonl"}
    card = (hub.folder / "someone/books/README.md").read_text()
    assert store.fingerprint in card
    assert 'fetch_store("someone/books")' in card
    for out in (None, tmp_path / "copy"):
        again = fetch_store("someone/books", out=out)
        assert again.fingerprint == store.fingerprint
        assert again.deleted == (1,)
        assert torch.equal(again.load_keys(), store.load_keys())
    assert main(["import", "hf://someone/books", "--out", str(tmp_path / "third")]) == 0
    assert len(Datastore.open(tmp_path / "third")) == 20


def test_what_is_damaged_neither_goes_nor_comes(store, hub):
    push_store(store, "someone/books", private=False)
    assert hub.calls == [("create", "someone/books", False)]
    file = hub.folder / "someone/books" / "values-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="was altered"):
        fetch_store("someone/books")
    (store.path / "values-00000.safetensors").unlink()
    with pytest.raises(CorruptStoreError, match="must exist"):
        push_store(store, "someone/other")


def test_refusals_of_the_hub(store, hub, monkeypatch):
    with pytest.raises(InputError, match=r"someone/none must be a dataset repository.*404"):
        fetch_store("someone/none")

    def refuse(*arguments, **named):
        raise OSError("403: not yours")

    monkeypatch.setattr(hub, "upload_folder", refuse)
    with pytest.raises(StoreError, match=r"403: not yours.*hf auth login"):
        push_store(store, "someone/books")
    assert issubclass(RepositoryNotFoundError, OSError)


def test_names_of_the_hub():
    assert hub_name("hf://a/b") == ("a/b", None)
    assert hub_name("hf://a/b@v1") == ("a/b", "v1")
    assert hub_name("stores/a") is None
    with pytest.raises(InputError, match="must be named hf://USER/NAME"):
        hub_name("hf://a")
