"""A corpus that every Python installation carries: the documentation of its own standard library.

Nothing is downloaded. The texts are the chapters of the language reference (``pydoc_data.topics``,
what ``help("ASSERT")`` shows), one document per section, and one document per module, class and
function with a docstring: name, signatures, docstrings. About 1.8 MB of English with code in it.

Nothing is imported either: modules of the standard library may open windows, start threads or fail,
so their *source* is parsed. Parts that distributions leave out (tests, idlelib, tkinter, ...) are
never read: the corpus depends on the Python version, not on who packaged it.

Split by document: the SHA-1 of its name decides. Documentation repeats itself (aliases, pure-Python
twins of C modules, reference chapters contained in other chapters), so a paragraph is dropped when
more than half of its 5-word sequences have already occurred in an earlier document, and documents
are read in the order train, dev, test: what is held out was not seen. (Brown et al. 2020, appendix
C, remove overlapping *documents* by 13-word sequences; paragraphs lose less text here.)
"""

import ast
import hashlib
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from memlm.core.errors import InputError
from memlm.data.documents import Document

# Packaged apart or left out by some distributions, not the library's own, or (encodings) 120
# copies of one module.
_SKIPPED = frozenset(
    {
        "test",
        "tests",
        "encodings",
        "idlelib",
        "tkinter",
        "turtledemo",
        "turtle",
        "lib2to3",
        "distutils",
        "ensurepip",
        "pydoc_data",
        "site-packages",
        "dist-packages",
        "sitecustomize",
        "usercustomize",
        "lib-dynload",
    }
)
_SEQUENCE = 5  # words; shorter paragraphs (signatures, headings) are too common to be copies
_REPEATED = 0.5  # of a paragraph's word sequences
_FEWEST_WORDS = 12  # of a docstring: shorter ones say little beyond the name
_FEWEST_DOCUMENTS = 200  # any complete installation has over 2,000
_DEV, _TEST = 5, 10  # percent of the documents
_WORD = re.compile(r"\w+")
_HEADING = re.compile(r"^(\S.*)\n[*=\-~^]{3,}\n", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class PythonLibrary(NamedTuple):
    """The standard library's documentation, split by document.

    Attributes:
        train: about 85 % of the documents, sorted by name.
        dev: about 5 %, to choose settings on.
        test: about 10 %, to report on.
    """

    train: list[Document]
    dev: list[Document]
    test: list[Document]

    def describe(self) -> str:
        """Version and sizes in one line."""
        sizes = ", ".join(
            f"{split} {len(documents):,} documents / "
            f"{sum(len(document.text.encode()) for document in documents) / 1e6:.2f} MB"
            for split, documents in zip(self._fields, self, strict=True)
        )
        return f"documentation of the Python {sys.version.split()[0]} standard library: {sizes}"


def python_library(root: Path | None = None) -> PythonLibrary:
    """The documentation of this Python's standard library, without overlap between the splits.

    Args:
        root: the folder of the library's sources; None: that of the running Python.

    Returns:
        The three splits; the same for every installation of one Python version.

    Raises:
        InputError: if the sources are not there (a frozen, zipped or stripped Python).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents = sorted(_documents(root))
    if len(documents) < _FEWEST_DOCUMENTS:
        raise InputError(
            f"the Python library must be there as source files, but {root} gave "
            f"{len(documents)} documented entries; use a Python that is not frozen or stripped, "
            "or give texts of your own"
        )
    splits = {name: PythonLibrary._fields[_split(name)] for name, _ in documents}
    ordered = sorted(documents, key=lambda document: _split(document.name))
    library = PythonLibrary([], [], [])
    for document in without_repeats(ordered):
        getattr(library, splits[document.name]).append(document)
    return library


def without_repeats(documents: list[Document]) -> Iterator[Document]:
    """Drop what earlier documents already said, and documents of which little is left.

    A paragraph goes when more than half of its 5-word sequences occurred in earlier documents; a
    document goes when all of its text did, letter case and punctuation aside, or when less than
    half of its words or fewer than 12 would stay.
    """
    seen: set[int] = set()
    texts: set[tuple[str, ...]] = set()
    for document in documents:
        title, _, body = document.text.partition("\n\n")
        words = tuple(_words(body))
        if words in texts:
            continue
        texts.add(words)
        paragraphs = _BLANK_LINES.split(body)
        sequences = [_sequences(paragraph) for paragraph in paragraphs]
        kept = [
            paragraph
            for paragraph, own in zip(paragraphs, sequences, strict=True)
            if not own or len(own & seen) <= _REPEATED * len(own)
        ]
        seen.update(*sequences)
        text = "\n\n".join(kept)
        if len(kept) == len(paragraphs):
            yield document
        elif len(_words(text)) >= max(_FEWEST_WORDS, len(words) / 2):
            yield Document(document.name, f"{title}\n\n{text}")


def _documents(root: Path) -> Iterator[Document]:
    """Every document of the library, in no particular order."""
    for title, sections in _sections(_topics(root / "pydoc_data" / "topics.py")).items():
        body = "\n\n".join(dict.fromkeys(sections))
        if len(_words(body)) >= _FEWEST_WORDS:
            yield Document(f"topics.{title}", f"{title}\n\n{body}\n")
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        if (tree := _parse(path)) is not None:
            module = ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)
            yield from _entries(tree, module)


def _entries(tree: ast.Module, module: str) -> Iterator[Document]:
    """One document for the module's own docstring and one per top-level class or function."""
    texts = {module: list(_docstring(tree))}
    for node in tree.body:
        if isinstance(node, _Definition):
            # A name defined twice (one per platform) is one entry.
            texts.setdefault(f"{module}.{node.name}", []).extend(_described(node))
    for name, paragraphs in texts.items():
        body = "\n\n".join(paragraphs)
        if len(_words(body)) >= _FEWEST_WORDS:
            yield Document(name, f"{name}\n\n{body}\n")


def _described(node: _Definition) -> Iterator[str]:
    """Signature and docstring of a definition, then of its documented methods and inner classes."""
    docstring = list(_docstring(node))
    if docstring:
        yield _signature(node)
        yield from docstring
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Definition):
                yield from _described(child)


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"


def _docstring(node: ast.Module | _Definition) -> Iterator[str]:
    if (text := ast.get_docstring(node, clean=False)) and (clean := inspect.cleandoc(text).strip()):
        yield "\n".join(line.rstrip() for line in clean.splitlines())


def _sections(topics: dict[str, str]) -> dict[str, list[str]]:
    """Section texts by title; chapters contain one another, so a title can have several."""
    sections: dict[str, list[str]] = {}
    for text in topics.values():
        # [before the first heading, title, text, title, text, ...]
        pieces = _HEADING.split(text)
        for title, section in zip(pieces[1::2], pieces[2::2], strict=True):
            sections.setdefault(title.strip(), []).append(section.strip())
    return sections


def _topics(path: Path) -> dict[str, str]:
    """The literal dictionary of reference chapters; empty where the file is missing."""
    tree = _parse(path)
    for node in tree.body if tree else []:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a source file; None if it is missing or not of this Python's syntax."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in docstrings
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def _split(name: str) -> int:
    """0 train, 1 dev, 2 test."""
    percent = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 100
    return 1 if percent < _DEV else 2 if percent < _DEV + _TEST else 0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _sequences(paragraph: str) -> set[int]:
    """Hashes of the paragraph's 5-word sequences; stable between runs."""
    words = _words(paragraph)
    return {
        int.from_bytes(
            hashlib.blake2b(" ".join(words[i : i + _SEQUENCE]).encode(), digest_size=8).digest()
        )
        for i in range(len(words) - _SEQUENCE + 1)
    }
