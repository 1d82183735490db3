"""``memlm passkey``: several ways to read, a table, a file and a map."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("passkey")
    model = tiny_model("llama", max_position_embeddings=64, vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_ways_to_read_are_compared(place, capsys):
    command = ("passkey", place / "model", "--lengths", 100, 140, "--depths", 0, 1, "--samples", 2)
    more = ("--methods", "vanilla", "window", "streaming-llm", "lm-infinite", "--save",
            place / "found.json")  # fmt: skip
    assert run(*command, *more) == 0
    shown = capsys.readouterr().out
    for word in ("vanilla", "window", "streaming-llm", "lm-infinite", "100%", "mean"):
        assert word in shown
    kept = json.loads((place / "found.json").read_text())
    assert kept["window"] == 64
    assert list(kept["methods"]) == ["vanilla", "window", "streaming-llm", "lm-infinite"]
    assert len(kept["methods"]["window"]["points"]) == 4
    assert run(*command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["window"] is None
    assert found["methods"]["vanilla"]["points"][0]["samples"] == 2


def test_the_map_is_drawn(place):
    pytest.importorskip("matplotlib")
    image = place / "map.svg"
    assert run("passkey", place / "model", "--lengths", 100, "--samples", 1, "--plot", image) == 0
    assert image.stat().st_size > 1000


def test_lengths_without_room_are_refused(place, capsys):
    assert run("passkey", place / "model", "--lengths", 20) == 2
    assert "room for the instruction, key and question" in capsys.readouterr().err
