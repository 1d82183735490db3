"""Stores of codes and several stores, called as verbs."""

import json

import numpy as np
import pytest

from memlm.cli.main import main
from memlm.store.reader import Datastore
from memlm.testing.tiny import tiny_model

WORDS = "the cat sat on mat and dog log a story about memory it was told once more".split()  # noqa: SIM905


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main([*(str(argument) for argument in arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("stores")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    for name, count in (("text", 10200), ("other", 60), ("held-out", 80)):
        (folder / f"{name}.txt").write_text(" ".join(draw.choice(WORDS, count)))
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_store_of_codes(place, capsys):
    options = ("--code-size", 4, "--lists", 8, "--nprobe", 8, "--threads", 1)
    store = place / "codes"
    command = ("build", place / "model", place / "text.txt", "--out", store, *options)
    planned = run_json(capsys, *command, "--plan")
    assert not store.exists()
    made = run_json(capsys, *command)
    assert made["entries"] == planned["entries"] == len(Datastore.open(store))
    assert Datastore.open(store).manifest.info.code_size == 5  # four, and one for the list
    whole = run_json(capsys, *command[:3], "--out", place / "whole", "--plan")
    assert planned["bytes"] < whole["bytes"] / 2
    model, text = str(place / "model"), str(place / "held-out.txt")
    assert main(["evaluate", model, text, "--store", str(store), "--k", "8"]) == 0
    shown = capsys.readouterr().out
    assert "kNN-LM" in shown
    assert "IVF8,PQ4" in shown
    assert main(["verify", str(store)]) == 0


def test_several_stores(place, capsys):
    for name in ("other", "held-out"):
        run_json(capsys, "build", place / "model", place / f"{name}.txt", "--out", place / name)
    command = ("evaluate", place / "model", place / "held-out.txt", "--k", 4)
    stores = (place / "other", place / "held-out")
    found = {}
    for lams in ((0.3, 0.2), (0.0, 0.2), (0.3, 0.0)):
        rows = run_json(
            capsys, *command, "--store", stores[0], "--lam", lams[0], "--also", stores[1], lams[1]
        )
        found[lams] = rows["kNN-LM"]["perplexity"]
    swapped = run_json(
        capsys, *command, "--store", stores[1], "--lam", 0.2, "--also", stores[0], 0.3
    )
    assert swapped["kNN-LM"]["perplexity"] == pytest.approx(found[0.3, 0.2], rel=1e-6)
    for lams, store, lam in (((0.0, 0.2), stores[1], 0.2), ((0.3, 0.0), stores[0], 0.3)):
        alone = run_json(capsys, *command, "--store", store, "--lam", lam)
        assert alone["kNN-LM"]["perplexity"] == pytest.approx(found[lams], rel=1e-6)
    options = ("--store", stores[0], "--k", 4, "--also", stores[1], 0.5, "--max-new-tokens", 3)
    assert run_json(capsys, "generate", place / "model", "the cat", *options)["texts"]


def test_mistakes(place, capsys):
    for more, words in (
        (("--also", "x", "0.1"), "it needs --store"),
        (("--store", "x", "--method", "retomaton", "--also", "y", "0.1"), "the method knn"),
        (("--store", "x", "--tune", "z", "--also", "y", "0.1"), "chooses for one datastore"),
    ):
        assert main(["evaluate", str(place / "model"), str(place / "other.txt"), *more]) == 2
        assert words in capsys.readouterr().err


def test_the_plan_of_an_index_says_where_its_parts_live(place, capsys):
    if not (place / "other").exists():
        run_json(capsys, "build", place / "model", place / "other.txt", "--out", place / "other")
    plan = run_json(capsys, "index", place / "other", "--type", "flat", "--plan")
    assert [part["name"] for part in plan["parts"]] == ["keys", "values", "places", "index"]
    assert main(["index", str(place / "other"), "--type", "flat", "--plan"]) == 0
    assert "MB in memory" in capsys.readouterr().out
