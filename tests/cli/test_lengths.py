"""The verbs of LM-Infinite: perplexity against length, and streams."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("lengths")
    tiny_model("llama", max_position_embeddings=32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["the cat sat on the mat and", "the dog sat on the log", "a story was told once more"]
    (folder / "text.txt").write_text("\n".join(words * 12))
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_several_lengths_are_compared(place, capsys):
    command = ("evaluate", place / "model", place / "text.txt", "--length", 32, 64, 96)
    more = ("--scored", 8, "--pieces", 2, "--save", place / "curve.json")
    assert run(*command, *more) == 0
    shown = capsys.readouterr().out
    for method in ("vanilla", "truncation", "window", "streaming-llm", "lm-infinite", "yarn"):
        assert method in shown
    kept = json.loads((place / "curve.json").read_text())
    assert kept["config"]["window"] == 32
    assert len(kept["points"]) == 21
    assert run(*command, *more, "--methods", "lm-infinite", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["points"]) == 3


def test_one_length_is_that_of_windows(place, capsys):
    assert run("evaluate", place / "model", place / "text.txt", "--length", 16, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["tokens"] > 100


def test_lengths_beyond_the_text_are_refused(place, capsys):
    command = ("evaluate", place / "model", place / "text.txt", "--length", 32, 9999)
    assert run(*command, "--scored", 8) == 2
    assert "must have the 9999 tokens" in capsys.readouterr().err


def test_a_stream_goes_on_where_it_stopped(place, capsys):
    command = ("stream", place / "model", place / "text.txt", "--every", 200, "--sinks", 4,
               "--out", place / "stream", "--chunk", 50)  # fmt: skip
    assert run(*command, "--tokens", 400) == 0
    shown = capsys.readouterr().out
    assert "window 32, 4 sinks (lm-infinite)" in shown
    assert run(*command, "--tokens", 600, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["tokens"] == 600
    kept = ("--save", place / "stream.json", "--plot", place / "stream.svg")
    assert run(*command, "--tokens", 600, *kept) == 0
    whole = json.loads((place / "stream.json").read_text())
    assert [point["tokens"] for point in whole["points"]] == [200, 400, 600]
    assert (place / "stream.svg").stat().st_size > 1000
    assert run(*command, "--tokens", 700, "--seed", 1) == 2
    assert "a run of this model and text" in capsys.readouterr().err
    log = (place / "stream" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in log] == [200, 400, 600]
    assert run(*command, "--tokens", 700, "--positions", "streaming") == 2
    assert "give another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--length", 32, 64, "--method", "trime"), "compare ways to read with the model alone"),
        (("--length", 32, 64, "--store", "x", "--stride", 8), "got --store, --stride beside them"),
        (("--method", "retomaton"), "--method retomaton needs a datastore"),
        (("--method", "knn"), "--method knn needs a datastore"),
        (("--tune", "x"), "--tune needs a datastore"),
        (("--window", 16), "--window says how several lengths are compared"),
        (("--start-token", 5, "--protocol", "fairseq"), "parts of a text are for the protocol"),
        (("--length", 32, 64, "--truncation-side", "right"), "side must be left or center"),
    ],
)
def test_options_that_do_not_go_together_are_refused(place, capsys, options, words):
    assert run("evaluate", place / "model", place / "text.txt", "--scored", 8, *options) == 2
    assert words in capsys.readouterr().err


def test_a_part_of_a_text(place, capsys):
    command = ("evaluate", place / "model", place / "text.txt", "--separator", "\n", "--json")
    part = ("--start-document", 3, "--limit", 5, "--document-tokens", 4, "--start-token", 2)
    assert run(*command, *part, "--truncation-side", "left", "--tokens", 9) == 0
    assert json.loads(capsys.readouterr().out)["base"]["tokens"] == 9
    sides = ("--length", 32, 40, "--methods", "truncation", "--scored", 8, "--window", 24)
    found = []
    for side in ("left", "center"):
        assert run(*command, *sides, "--truncation-side", side) == 0
        found.append(json.loads(capsys.readouterr().out)["points"])
    assert found[0][1]["nll"] != found[1][1]["nll"]
