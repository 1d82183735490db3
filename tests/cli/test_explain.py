"""``memlm explain`` on a tiny model: a table, JSON, a page, and its mistakes."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import memlm
from memlm.cli.main import main
from memlm.testing.tiny import tiny_model

PROMPT = "the cat sat on the mat and the dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("explain")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    (folder / "text" / "0.txt").write_text("the dog sat on the log and the cat sat on the mat")
    assert run("build", folder / "model", folder / "text", "--out", folder / "store") == 0
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def explained(place, capsys, *arguments):
    capsys.readouterr()
    assert run("explain", place / "model", PROMPT, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def knn(place):
    return ("--store", place / "store", "--k", 4, "--lam", 0.3)


def test_every_token_of_the_prompt(place, knn, capsys):
    found = explained(place, capsys, *knn, "--save", place / "new" / "found.json")
    assert json.loads((place / "new" / "found.json").read_text()) == found
    assert [token["text"] for token in found["tokens"]] == PROMPT.split()[1:]
    assert all(token["share"] == pytest.approx(0.3) for token in found["tokens"])
    assert found["memory"]["memory"] == "knn"


def test_what_the_model_goes_on_with(place, knn, capsys):
    found = explained(place, capsys, *knn, "--max-new-tokens", 3, "--top", 2)
    assert [token["place"] for token in found["tokens"]] == [9, 10, 11]
    assert all(len(token["sources"]) <= 2 for token in found["tokens"])


def test_a_model_that_was_saved_with_its_memory(place, knn, capsys):
    model, store = AutoModelForCausalLM.from_pretrained(place / "model"), place / "store"
    memory = memlm.KnnMemory(memlm.Datastore.open(store), k=4)
    memlm.attach(model, memory, memlm.Mixture(0.3)).save_pretrained(place / "saved")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(place / "saved")
    wanted = explained(place, capsys, *knn)
    assert run("explain", place / "saved", PROMPT, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == wanted["tokens"]


def test_a_table_and_a_page(place, capsys):
    page = place / "pages" / "one.html"
    assert run("explain", place / "model", PROMPT, "--method", "trime", "--html", page) == 0
    assert "heaviest source" in capsys.readouterr().out
    assert page.read_text().count("<aside>") == len(PROMPT.split()) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPT,), "only a memory can be explained"),
        (("", "--method", "trime"), "the prompt must not be empty"),
        (("cat", "--method", "trime"), "one text of at least 2 tokens"),
        (
            (PROMPT, "--method", "trime", "--long", 64),
            "a long-term memory of 64 positions is empty",
        ),
        ((PROMPT, "--interpolate", 0.3, 1.0), "--interpolate mixes TRIME's datastore in"),
        ((PROMPT, "--method", "trime", "--max-new-tokens", -1), "must not be negative, got -1"),
    ],
)
def test_mistakes_are_said_in_one_line(place, capsys, arguments, message):
    assert run("explain", place / "model", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
