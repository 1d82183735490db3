"""The documentation is true: its Python runs, its commands parse, its examples work, its links lead
somewhere, and every public name is explained.

Pages use the names a newcomer would: the model ``gpt2``, the folders ``my_docs/``, ``dev_docs/``
and ``test_docs/``. Here they are a tiny random GPT-2 and a few made-up sentences.
"""

import importlib
import os
import random
import re
import runpy
import shlex
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import memlm
from memlm.cli import main as cli
from memlm.testing.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOT_RUN = "# not run"

WHO = ("the model", "a reader", "the memory", "every store", "the first rule", "an index")
DOES = ("reads", "keeps", "finds", "follows", "checks", "writes down")
WHAT = ("the text", "one entry", "a hidden state", "the next token", "its neighbours", "a shard")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every ``memlm`` line in the shell blocks of a page."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("memlm ")]


def pages_with(found) -> list:
    return [pytest.param(page, id=page.stem) for page in PAGES if found(page)]


def sentences(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join(
        f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)}.".capitalize()
        for _ in range(count)
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the model and the texts that the pages speak of."""
    folder = tmp_path_factory.mktemp("documentation")
    for name, documents in (("my_docs", 12), ("dev_docs", 3), ("test_docs", 3)):
        (folder / name).mkdir()
        for number in range(documents):
            (folder / name / f"{number}.txt").write_text(sentences(20, seed=len(name) + number))
    texts = [path.read_text() for path in sorted((folder / "my_docs").iterdir())]
    tokenizer = memlm.train_tokenizer(memlm.read_documents(texts), vocab_size=300)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model = tiny_model("gpt2", vocab_size=len(tokenizer), **ids)
    model.save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """An empty working directory in which the prepared names are found."""
    for entry in prepared.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with(lambda page: blocks(page, "python")))
def test_python_of_a_page_runs(page, place):
    namespace: dict = {"__name__": f"documentation_of_{page.stem}"}
    for number, block in enumerate(blocks(page, "python"), start=1):
        if block.startswith(NOT_RUN):
            compile(block, f"{page.name}, block {number}", "exec")
            continue
        with warnings.catch_warnings():
            # made-up text is small: fewer neighbours, a flat index
            warnings.simplefilter("ignore", UserWarning)
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", pages_with(commands))
def test_commands_of_a_page_parse(page, monkeypatch):
    ran = []
    for verb in cli._VERBS.values():
        monkeypatch.setattr(verb, "run", lambda self: ran.append(type(self)) or 0)
    for arguments in commands(page):
        assert cli.main(arguments) == 0
        assert ran[-1] is cli._VERBS[arguments[0]]


def test_every_verb_is_shown_at_work():
    shown = {arguments[0] for arguments in commands(ROOT / "docs" / "cli.md")}
    assert shown == set(cli._VERBS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "an example without arguments leaves nothing behind"


@pytest.mark.parametrize("name", [name for name in memlm.__all__ if not name.startswith("__")])
def test_a_public_name_is_explained(name):
    thing = getattr(memlm, name)
    own = thing.__dict__.get("__doc__") if isinstance(thing, type) else thing.__doc__
    assert own, f"memlm.{name} has no docstring"
    reference = (ROOT / "docs" / "api.md").read_text()
    assert re.search(rf"^::: {re.escape(thing.__module__)}(\.{name})?$", reference, re.MULTILINE)


def test_the_reference_names_things_that_exist():
    for path in re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE):
        try:
            importlib.import_module(path)
        except ModuleNotFoundError:
            module, _, name = path.rpartition(".")
            assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_pictures_are_whole_and_say_what_they_show():
    for picture in (ROOT / "docs" / "assets").glob("*.svg"):
        root = ElementTree.parse(picture).getroot()
        assert root.find("{*}title") is not None, picture
        assert root.find("{*}desc") is not None, picture


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}" in navigation, f"{page.name} is missing in mkdocs.yml"


def test_no_page_names_a_path_of_one_machine():
    home = os.path.expanduser("~")
    for page in [*PAGES, *EXAMPLES]:
        assert not re.search(
            rf"(?<![\w./])(/tmp/|/home/|/root\b|{re.escape(home)}\b)", page.read_text()
        )
