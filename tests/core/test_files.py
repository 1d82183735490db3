import json
import os

import pytest

from memlm.core.errors import CorruptStoreError, StoreError
from memlm.core.files import checksum, fingerprint, read_json, write_atomic, write_json
from memlm.core.journal import Journal


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(CorruptStoreError, match=r"none\.json must exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(CorruptStoreError, match=r"torn\.json must hold JSON"):
        read_json(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(CorruptStoreError, match="one JSON object, got list"):
        read_json(tmp_path / "list.json")


def test_fingerprints_ignore_key_order_and_see_values():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_checksum_sees_one_bit(tmp_path):
    path = tmp_path / "x"
    write_atomic(path, lambda file: file.write(b"\0" * 3_000_000))
    before = checksum(path)
    write_atomic(path, lambda file: file.write(b"\0" * 2_999_999 + b"\1"))
    assert checksum(path) != before


def test_journal_survives_torn_and_doubled_lines(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.read() == []
    journal.append({"range": 0})
    with open(journal.path, "ab") as file:
        file.write(b'{"range": 1, "che')
    journal.append({"range": 2})
    journal.append({"range": 2})
    assert journal.read() == [{"range": 0}, {"range": 2}, {"range": 2}]
    assert all(json.loads(line) for line in journal.path.read_text().split("\n") if "}" in line)
