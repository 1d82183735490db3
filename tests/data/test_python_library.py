"""The corpus every Python carries: complete, split without overlap, and read without importing."""

import ast
import re
import sys

import pytest

from memlm.core.errors import InputError
from memlm.data.documents import Document
from memlm.data.python_library import PythonLibrary, python_library, without_repeats


@pytest.fixture(scope="module")
def library() -> PythonLibrary:
    return python_library()


def five_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def paragraphs(document: Document) -> list[str]:
    return re.split(r"\n\s*\n", document.text.partition("\n\n")[2])


def test_is_large_enough_to_train_on_and_split_by_documents(library):
    sizes = [sum(len(document.text) for document in split) for split in library]
    assert sizes[0] > 1_000_000
    assert 0.02 < sizes[1] / sum(sizes) < 0.12
    assert 0.05 < sizes[2] / sum(sizes) < 0.18
    names = [document.name for split in library for document in split]
    assert len(names) == len(set(names)) > 1_500
    assert "documents" in library.describe()


def test_no_held_out_paragraph_was_seen_before(library):
    seen: set[tuple[str, ...]] = set()
    for document in library.train:
        for paragraph in paragraphs(document):
            seen |= five_words(paragraph)
    held_out = 0
    for split in (library.dev, library.test):
        for document in split:
            for paragraph in paragraphs(document):
                own = five_words(paragraph)
                assert not own or len(own & seen) <= len(own) / 2, document.name
                held_out += bool(own)
        for document in split:
            for paragraph in paragraphs(document):
                seen |= five_words(paragraph)
    assert held_out > 300


def test_no_text_occurs_twice(library):
    texts = [
        " ".join(re.findall(r"\w+", document.text.partition("\n\n")[2].lower()))
        for split in library
        for document in split
    ]
    assert len(texts) == len(set(texts))


def test_is_the_same_every_time_and_imports_nothing(library):
    before = set(sys.modules)
    assert python_library() == library
    assert set(sys.modules) == before


def test_optional_parts_are_left_out(library):
    names = {document.name.partition(".")[0] for split in library for document in split}
    assert not names & {"test", "idlelib", "tkinter", "turtle", "lib2to3", "distutils", "pip"}
    assert {"argparse", "asyncio", "topics"} <= names


def write_library(folder, count=300):
    (folder / "package").mkdir(parents=True)
    for number in range(count):
        words = " ".join(f"word{number}x{place}" for place in range(40))
        (folder / f"module{number}.py").write_text(f'"""{words}"""\n', encoding="utf-8")


def test_reads_signatures_and_docstrings_of_broken_and_dangerous_modules(tmp_path):
    write_library(tmp_path)
    (tmp_path / "package" / "__init__.py").write_text(
        'raise SystemExit("imported")\n'
        "class Kept(Base, metaclass=Meta):\n"
        '    """Explain the class with enough words to be worth keeping as one document here.\n\n'
        '        Indented detail.\n    """\n'
        "    async def run(self, *, fast: bool = True):\n"
        '        """Run it once and say what happened."""\n'
        "    def silent(self): ...\n",
        encoding="utf-8",
    )
    (tmp_path / "broken.py").write_text("def (:\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b'"""\xe9"""\n')
    found = {
        document.name: document.text for split in python_library(tmp_path) for document in split
    }
    text = found["package.Kept"]
    assert text.startswith("package.Kept\n\nclass Kept(Base)\n\nExplain the class")
    assert "def run(self, *, fast: bool=True)\n\nRun it once" in text
    assert "silent" not in text
    assert not {"broken", "latin", "package"} & set(found)


def test_reference_chapters_become_sections_and_may_be_missing(tmp_path):
    write_library(tmp_path)
    assert not [
        d for split in python_library(tmp_path) for d in split if d.name.startswith("topics")
    ]
    body = " ".join(f"reference{place}" for place in range(30))
    inner = " ".join(f"inner{place}" for place in range(30))
    chapter = f"Outer part\n**********\n\n{body}\n\n\nInner part\n==========\n\n{inner}\n"
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "# -*- coding: utf-8 -*-\ntopics = "
        + ast.unparse(
            ast.parse(repr({"outer": chapter, "alone": chapter[chapter.index("Inner") :]}))
        )
        + "\n",
        encoding="utf-8",
    )
    found = {d.name: d.text for split in python_library(tmp_path) for d in split}
    assert found["topics.Outer part"] == f"Outer part\n\n{body}\n"
    assert found["topics.Inner part"] == f"Inner part\n\n{inner}\n"


def test_a_stripped_installation_is_refused(tmp_path):
    with pytest.raises(InputError, match="source files"):
        python_library(tmp_path)


def test_repeats_are_dropped_by_paragraph_and_by_document():
    fresh = "one two three four five six seven eight nine ten eleven twelve thirteen"
    other = "red orange yellow green blue indigo violet black white grey pink brown teal"
    documents = [
        Document("a", f"a\n\n{fresh}"),
        Document("alias", f"alias\n\n{fresh.upper()}!"),
        Document("b", f"b\n\n{other}\n\n{fresh}"),
        Document("near", f"near\n\nnew {fresh} end"),
        Document("short", "short\n\nReturn it."),
        Document("again", "again\n\nReturn it."),
    ]
    kept = list(without_repeats(documents))
    assert [document.name for document in kept] == ["a", "b", "short"]
    assert kept[1].text == f"b\n\n{other}"
