"""Documents: every source gives the same texts, in a fixed order, and bad ones are named."""

import bz2
import gzip
import json
import lzma
import sys

import datasets
import pytest
import zstandard

from memlm.core.errors import InputError, MissingExtraError
from memlm.data.documents import Document, read_documents

PACK = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source, **options):
    return [tuple(document) for document in read_documents(source, **options)]


@pytest.mark.parametrize("ending", PACK)
def test_text_files_are_one_document_packed_or_not(ending, tmp_path):
    path = tmp_path / f"läse.txt{ending}"
    path.write_bytes(PACK[ending]("\ufeffein\r\nzwei é\n".encode()))
    assert read(path) == [(path.name, "ein\nzwei é\n")]
    assert read(str(path)) == read(path)


@pytest.mark.parametrize("ending", PACK)
def test_records_are_one_document_a_line(ending, tmp_path):
    records = [
        {"id": 7, "title": "t", "text": "a"},
        {"title": "named", "text": "b"},
        {"id": "", "text": ""},
    ]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / f"r.jsonl{ending}").write_bytes(PACK[ending](lines.encode()))
    expected = [("7", "a"), ("named", "b"), ("r.jsonl:5", "")]
    found = read(tmp_path / f"r.jsonl{ending}")
    assert [(name.replace(ending, ""), text) for name, text in found] == expected


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    for name in ("b/z.md", "b/a.py", "a.txt", "c.jsonl", "b.txt", ".git/x.txt", ".h.txt", "p.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("l") else name)
    (tmp_path / "b" / "k.rst.gz").write_bytes(gzip.compress(b"packed"))
    assert read(tmp_path) == [
        ("a.txt", "a.txt"),
        ("b/a.py", "b/a.py"),
        ("b/k.rst.gz", "packed"),
        ("b/z.md", "b/z.md"),
        ("b.txt", "b.txt"),
        ("c.jsonl:1", "c.jsonl"),
    ]
    assert read(tmp_path, suffixes=[".png"]) == [("p.png", "p.png")]
    assert read(tmp_path, limit=2) == read(tmp_path)[:2]


def test_a_file_of_any_name_is_read_when_named_directly(tmp_path):
    (tmp_path / "LICENSE").write_text("free")
    assert read(tmp_path / "LICENSE") == [("LICENSE", "free")]


def test_separators_split_text_files(tmp_path):
    (tmp_path / "s.txt").write_text("one\n<|end|>\n  <|end|>two")
    assert read(tmp_path / "s.txt", separator="<|end|>") == [
        ("s.txt#1", "one\n"),
        ("s.txt#2", "two"),
    ]


def test_blank_lines_are_lines(tmp_path):
    (tmp_path / "s.txt").write_text("one\n\n \ntwo\n")
    assert [text for _, text in read(tmp_path / "s.txt", separator="\n")] == ["one", "", " ", "two"]


def test_data_sets_and_iterables_are_rows():
    rows = {"text": ["a", "b"], "id": ["x", "y"], "other": ["c", "d"]}
    data = datasets.Dataset.from_dict(rows)
    assert read(data) == [("x", "a"), ("y", "b")]
    assert read(data.to_iterable_dataset(), text_field="other") == [("x", "c"), ("y", "d")]
    assert read(["a", Document("n", "b"), {"text": "c"}]) == [("0", "a"), ("n", "b"), ("2", "c")]
    assert read((word for word in ("a", "b")), limit=1) == [("0", "a")]


def test_several_zst_frames_are_one_file(tmp_path):
    parts = [b"one ", b"", b"two " * 700_000, b"three"]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(PACK[".zst"](part) for part in parts))
    assert read(tmp_path / "a.txt.zst") == [("a.txt.zst", b"".join(parts).decode())]


def test_zst_without_its_package_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "a.txt.zst").write_bytes(PACK[".zst"](b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'memlm\[zstd\]'"):
        read(tmp_path / "a.txt.zst")


FILES = {
    "bad.txt": b"abc\xff",
    "bad.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n',
    "field.jsonl": b'{"text": "a"}\n{"body": "b", "id": 1}\n',
    "number.jsonl": b'{"text": 5}\n',
    "list.jsonl": b"[1]\n",
    "torn.jsonl": b'{"text": "a"}\n{"text"\n',
    "empty.jsonl": b"\n",
    "cut.txt.gz": gzip.compress(b"a" * 1000)[:-9],
    "cut.txt.xz": lzma.compress(b"a" * 1000)[:-9],
    "cut.txt.zst": PACK[".zst"](b"a" * 1000)[:-3],
    "no.txt.gz": b"plain",
    "no.txt.zst": b"plain",
    "cut.txt.bz2": bz2.compress(b"a" * 1000)[:-9],
    "folder/x.png": b"x",
}


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("nowhere", {}, r"nowhere' must be a file or folder but does not exist.*\[text\]"),
        ("folder", {}, r"none of its files ends in \.txt \.text"),
        ("bad.txt", {}, r"bad\.txt must be UTF-8 text, but byte 3 \(0xff\)"),
        ("bad.jsonl", {}, r"bad\.jsonl, line 2 must be UTF-8 text"),
        ("field.jsonl", {}, r"line 2 must have the field 'text', but its fields are 'body', 'id'"),
        ("number.jsonl", {}, r"field 'text' of .*line 1 must be a text, got int"),
        ("list.jsonl", {}, "line 1 must be one JSON object, got list"),
        ("torn.jsonl", {}, "line 2 must be one JSON object, but is not"),
        ("empty.jsonl", {}, r"at least one document, but .*empty\.jsonl holds none"),
        ("cut.txt.gz", {}, r"cut\.txt\.gz must be a file that can be read"),
        ("cut.txt.xz", {}, r"cut\.txt\.xz must be a file that can be read"),
        ("cut.txt.bz2", {}, r"cut\.txt\.bz2 must be a file that can be read"),
        ("cut.txt.zst", {}, r"cut\.txt\.zst must be a file that can be read.*too early"),
        ("no.txt.gz", {}, r"no\.txt\.gz must be a file that can be read"),
        ("no.txt.zst", {}, r"no\.txt\.zst must be a file that can be read"),
        ("bad.txt", {"limit": 0}, "limit must be at least 1"),
        ("bad.txt", {"separator": ""}, "at least one character"),
    ],
)
def test_bad_files_are_named(source, options, message, tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        read(tmp_path / source, **options)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "the list holds none"),
        (["a", 3], "item 1 is int"),
        ([{"body": "x"}], "row 0 must have the field 'text', but its fields are 'body'"),
        ([{}], "its fields are none"),
        (7, "iterable of strings, got int"),
        (
            datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})),
            "'train'.*choose",
        ),
    ],
)
def test_bad_iterables_are_named(source, message):
    with pytest.raises(InputError, match=message):
        read(source)


def test_a_missing_path_is_named_before_anything_is_read():
    with pytest.raises(InputError, match="does not exist"):
        read_documents("nowhere/at/all")
