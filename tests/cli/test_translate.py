"""``memlm translate``."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_translator


@pytest.fixture
def place(tmp_path, tokenizer):
    model = tiny_translator("t5", vocab_size=len(tokenizer), eos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.tsv").write_text("the cat\tthe dog sat\na story\tit was told\n" * 3)
    return tmp_path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_a_store_is_made_and_used(place, capsys):
    pytest.importorskip("sacrebleu")
    command = ("translate", place / "model", place / "pairs.tsv", "--beams", 2, "--new-tokens", 5)
    memory = ("--store", place / "store", "--remember", place / "pairs.tsv", "--lam", 0.9, "--k", 1)
    assert run(*command, *memory, "--save", place / "result.json") == 0
    shown = capsys.readouterr().out
    assert "kNN-MT" in shown
    assert "end tokens included" in shown
    kept = json.loads((place / "result.json").read_text())
    assert kept["kNN-MT"]["perplexity"] < 1.2 < kept["base"]["perplexity"]
    assert len(kept["kNN-MT"]["translations"]) == 6
    assert run(*command, "--no-write", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"base", "settings"}
    assert run(*command, "--remember", place / "pairs.tsv") == 2
    assert "give --store" in capsys.readouterr().err
