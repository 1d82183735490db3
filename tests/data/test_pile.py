"""Files of the Pile: every text lands in one subset, and split files are read like any other."""

import gzip
import json

import pytest

from memlm.core.errors import InputError
from memlm.data.documents import read_documents
from memlm.data.pile import read_pile, split_pile


def line(text, subset):
    return json.dumps({"text": text, "meta": {"pile_set_name": subset}}) + "\n"


def test_subsets_are_split_and_read_by_length(tmp_path):
    texts = {"ArXiv": ["ab: longer", "a:b", "none"], "Größe": ["äöü\nx", "y"]}
    raw = tmp_path / "raw.jsonl.gz"
    with gzip.open(raw, "wt") as file:
        file.writelines(line(text, name) for name, some in texts.items() for text in some)
    assert split_pile(raw, tmp_path / "out") == {"ArXiv": 3, "Größe": 2}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ArXiv.jsonl",
        "Größe.jsonl",
    ]
    split = tmp_path / "out" / "Größe.jsonl"
    assert [document.text for document in read_documents(split)] == texts["Größe"]
    assert [document.name for document in read_documents(split)] == [
        "Größe.jsonl:1",
        "Größe.jsonl:2",
    ]
    assert [document.text for document in read_pile(split)] == ["y", "äöü\nx"]
    arxiv = tmp_path / "out" / "ArXiv.jsonl"
    assert [document.text for document in read_pile(arxiv)] == ["a:b", "ab: longer"]
    assert [document.text for document in read_pile(arxiv, start=1, limit=5)] == ["ab: longer"]


def test_bad_lines_leave_the_files_as_they_were(tmp_path):
    (tmp_path / "raw.jsonl").write_text(line("new", "A") + line("x", "../B"))
    (tmp_path / "A.jsonl").write_text('"old"\n')
    with pytest.raises(
        InputError, match=r"line 2 must be usable as the name of a file, got '\.\./B'"
    ):
        split_pile(tmp_path / "raw.jsonl", tmp_path)
    assert (tmp_path / "A.jsonl").read_text() == '"old"\n'
    (tmp_path / "raw.jsonl").write_text('{"text": "no subset"}\n')
    with pytest.raises(InputError, match=r"must have the fields text and meta\.pile_set_name"):
        split_pile(tmp_path / "raw.jsonl", tmp_path)
    with pytest.raises(InputError, match="start must be at least 0, got -1"):
        read_pile(tmp_path / "A.jsonl", start=-1)
    with pytest.raises(InputError, match="limit must be at least 1 document, got 0"):
        read_pile(tmp_path / "A.jsonl", limit=0)
    with pytest.raises(InputError, match="must be a file that can be read"):
        split_pile(tmp_path / "none.jsonl", tmp_path)
