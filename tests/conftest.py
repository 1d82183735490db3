"""Shared fixtures: golden cases, one test run per folder of a kind.

A test that takes an argument named ``golden_<system>_<kind>`` runs once per folder of that kind,
for every root: ``tests/golden`` and, when given, the directory after ``--golden``.
"""

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).parent
BESIDE = HERE.parent.parent / "shared" / "golden"
WORDS = "the cat sat on mat and dog log a story about memory it was told once more"
SYSTEMS = ("retomaton", "trime", "retro", "tupe", "lminfinite")


def pytest_addoption(parser):
    parser.addoption(
        "--golden", type=Path, default=None, help="root of golden cases: <root>/<system>/CASES.json"
    )


def golden_roots(config) -> list[Path]:
    if given := config.getoption("--golden"):
        return [given]
    return [root for root in (HERE / "golden", BESIDE) if root.is_dir()]


def golden_folders(config, system: str, kind: str) -> list[Path]:
    folders = []
    for root in golden_roots(config):
        cases = root / system / "CASES.json"
        if cases.exists():
            names = json.loads(cases.read_text(encoding="utf-8")).get(kind, [])
            folders += [root / system / name for name in names]
    return folders


def sibling(path: Path, kind: str) -> Path:
    """The folder of another kind that belongs to ``path``.

    Of as many folders the one at the same place of its list, else the first; a kind that
    CASES.json does not list is the folder of that name.
    """
    root = next(parent for parent in path.parents if (parent / "CASES.json").exists())
    cases = json.loads((root / "CASES.json").read_text(encoding="utf-8"))
    own = next((names for names in cases.values() if path.name in names), [path.name])
    others = cases.get(kind, [kind])
    return root / others[own.index(path.name) if len(own) == len(others) else 0]


def pytest_generate_tests(metafunc):
    for name in metafunc.fixturenames:
        if not name.startswith("golden_"):
            continue
        system, _, kind = name.removeprefix("golden_").partition("_")
        if system not in SYSTEMS:
            continue
        folders = golden_folders(metafunc.config, system, kind)
        labels = [f"{folder.parent.parent.parent.name}-{folder.name}" for folder in folders]
        metafunc.parametrize(name, folders, ids=labels)


@pytest.fixture(autouse=True)
def _threads_are_given_back():
    """No test may leave the number of torch threads changed."""
    import torch

    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "a thread count was changed and not restored"


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of a few dozen words, with an end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )
