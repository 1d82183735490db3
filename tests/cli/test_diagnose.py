"""``memlm diagnose``: tables, a file, a picture, and refusals."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("diagnose")
    model = tiny_model("llama", max_position_embeddings=32, vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["the cat sat on the mat and", "the dog sat on the log", "a story was told once more"]
    (folder / "text.txt").write_text("\n".join(words * 12))
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_it_prints_keeps_and_draws(place, capsys):
    pytest.importorskip("matplotlib")
    command = ("diagnose", place / "model", place / "text.txt", "--scored", 16, "--pieces", 2)
    more = ("--save", place / "found.json", "--plot", place / "found.svg")
    assert run(*command, *more) == 0
    shown = capsys.readouterr().out
    for words in ("score to 32", "to 128", "first token apart", "recommended: window"):
        assert words in shown
    kept = json.loads((place / "found.json").read_text())
    assert kept["diagnosis"]["config"]["length"] == 128
    assert kept["recommendation"]["config"]["windows"] == [4, 8, 16, 32]
    assert (place / "found.svg").stat().st_size > 5000
    few = ("--length", 64, "--trained", 40, "--windows", 20, "--sinks", 2, "--json")
    assert run(*command, *few) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["diagnosis"]["config"]["trained"] == 40
    assert [one["window"] for one in found["recommendation"]["settings"]] == [20]


def test_models_without_relative_positions_are_refused(place, tokenizer, capsys):
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "gpt2")
    assert run("diagnose", place / "gpt2", place / "text.txt", "--length", 130) == 2
    assert "extend_context knows the families" in capsys.readouterr().err


def test_short_texts_and_odd_settings_are_refused(place, capsys):
    assert run("diagnose", place / "model", place / "text.txt", "--length", 9999) == 2
    assert "tokens of a piece" in capsys.readouterr().err
    assert run("diagnose", place / "model", place / "text.txt", "--length", 16) == 2
    assert "that the model was trained on, got 16" in capsys.readouterr().err
