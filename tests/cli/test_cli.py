"""Every verb in-process, on a tiny model and a few sentences."""

import json
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from memlm.cli.main import main
from memlm.formats.binarised import Lines, write_lines
from memlm.testing.tiny import tiny_model

SENTENCES = [
    "the cat sat on the mat and the dog sat on the log",
    "a story about memory : it was told once more",
    "the dog sat on the mat and the story was told once more",
]


RETOMATON = ("--store", "STORE", "--k", 8, "--method", "retomaton")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with model, text and a finished store."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for number, sentence in enumerate(SENTENCES * 4):
        (folder / "text" / f"{number}.txt").write_text(sentence)
    (folder / "held-out.txt").write_text(" ".join(SENTENCES))
    assert run("build", folder / "model", folder / "text", "--out", folder / "store") == 0
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_build_says_what_it_made_and_repeats_harmlessly(place, capsys):
    arguments = ("build", place / "model", place / "text", "--out", place / "store")
    first = run_json(capsys, *arguments)
    assert first["entries"] > 100
    assert first["tap"] == "ffn_input"
    assert run_json(capsys, *arguments) == first
    assert run(*arguments) == 0
    assert "memlm evaluate" in capsys.readouterr().out


def test_evaluate_prints_protocol_and_saves_everything(place, capsys):
    store = ("--store", place / "store", "--k", 8)
    saved = place / "runs" / "result.json"
    text = place / "held-out.txt"
    rows = run_json(capsys, "evaluate", place / "model", text, *store, "--save", saved)
    assert set(rows) == {"base", "kNN-LM"}
    assert rows["kNN-LM"]["perplexity"] < rows["base"]["perplexity"]
    kept = json.loads(saved.read_text())
    assert kept["kNN-LM"]["protocol"]["memory"]["k"] == 8
    assert run("evaluate", place / "model", text, *store) == 0
    shown = capsys.readouterr().out
    assert "protocol" in shown
    assert "sliding windows" in shown


def test_tuning_chooses_on_other_text(place, capsys):
    rows = run_json(
        capsys,
        "evaluate",
        place / "model",
        place / "held-out.txt",
        *("--store", place / "store", "--k", 8, "--tune", place / "held-out.txt"),
    )
    assert rows["kNN-LM"]["perplexity"] <= rows["base"]["perplexity"]


@pytest.mark.parametrize("protocol", ["knn-transformers", "fairseq"])
def test_the_other_protocols_run(protocol, place, capsys):
    lines = place / "lines.txt"
    lines.write_text("\n".join(SENTENCES * 3))
    arguments = ("evaluate", place / "model", lines, "--protocol", protocol, "--length", 16)
    assert run(*arguments) == 0
    assert protocol in capsys.readouterr().out


def test_index_is_built_used_and_reported(place, capsys):
    plan = run_json(capsys, "index", place / "store", "--type", "flat", "--plan")
    assert plan["factory"] == "Flat"
    described = run_json(capsys, "index", place / "store", "--type", "flat")
    assert described["recall"]["value"] == pytest.approx(1.0)
    text = place / "held-out.txt"
    assert run("evaluate", place / "model", text, "--store", place / "store", "--k", 8) == 0
    assert "recall" in capsys.readouterr().out
    exact = ("--store", place / "store", "--k", 8, "--index", "exact")
    assert run("evaluate", place / "model", text, *exact) == 0
    assert "recall" not in capsys.readouterr().out


def test_generate_with_and_without_memory(place, capsys):
    texts = run_json(
        capsys,
        "generate",
        place / "model",
        "the cat sat on",
        *("--store", place / "store", "--k", 8, "--lam", 1.0, "--compare"),
        *("--max-new-tokens", 4),
    )["texts"]
    assert set(texts) == {"base", "kNN-LM"}
    assert texts["kNN-LM"].startswith("the cat sat on the")
    sample = ("generate", place / "model", "the cat", "--sample", "--seed", 3)
    assert run(*sample) == 0
    first = capsys.readouterr().out
    assert run(*sample) == 0
    assert capsys.readouterr().out == first


def test_retomaton_is_clustered_evaluated_and_generates(place, capsys, tmp_path):
    import shutil

    shutil.copytree(place / "store", tmp_path / "store")
    store = ("--store", tmp_path / "store", "--k", 8, "--method", "retomaton")
    described = run_json(capsys, "cluster", tmp_path / "store", "--clusters", 3)
    assert described["clusters"] == 3

    text, saved = place / "held-out.txt", tmp_path / "result.json"
    rows = run_json(capsys, "evaluate", place / "model", text, *store, "--save", saved)
    assert set(rows) == {"base", "RetoMaton"}
    assert rows["RetoMaton"]["perplexity"] < rows["base"]["perplexity"]
    assert rows["RetoMaton"]["saved"] > 0
    assert json.loads(saved.read_text())["RetoMaton"]["memory_stats"]["searches"] > 0
    settings = ("--min-knns", 10**9, "--max-knns", 16, "--multiplicity", 0.5, "--clusters", "none")
    tuned = ("--tune", text, "--carry", "window")
    rows = run_json(
        capsys, "evaluate", place / "model", text, *store, *settings, *tuned, "--save", saved
    )
    assert rows["RetoMaton"]["saved"] == 0
    kept = json.loads(saved.read_text())
    memory = kept["RetoMaton"]["protocol"]["memory"]
    assert (memory["max_knns"], memory["multiplicity"], memory["clusters"]) == (16, 0.5, None)
    assert memory["temperature"] == kept["tuned"]["best"]["temperature"]
    assert kept["RetoMaton"]["protocol"]["carry"] == "window"
    assert run("evaluate", place / "model", text, *store) == 0
    shown = capsys.readouterr().out
    assert "3 clusters" in shown
    assert "saved 0." in shown

    prompt = ("generate", place / "model", "the cat sat on", "--max-new-tokens", 4, "--compare")
    texts = run_json(capsys, *prompt, *store, "--lam", 1.0, "--temperature", 0.1)["texts"]
    assert set(texts) == {"base", "RetoMaton"}
    assert texts["RetoMaton"].startswith("the cat sat on the")


def test_verify_says_sound_or_damaged(place, capsys, tmp_path):
    import shutil

    assert run("verify", place / "store") == 0
    assert "sound" in capsys.readouterr().out
    deep = ("--level", "deep", "--model", place / "model", "--text", place / "text")
    assert run("verify", place / "store", *deep) == 0
    assert "equal to the bit" in capsys.readouterr().out
    shutil.copytree(place / "store", tmp_path / "bad")
    file = tmp_path / "bad" / "keys-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert run("verify", tmp_path / "bad") == 1
    assert "was altered" in capsys.readouterr().out


def test_doctor_is_well(capsys):
    report = run_json(capsys, "doctor")
    assert report["ok"]
    assert {"index", "store", "threads"} <= {finding["name"] for finding in report["findings"]}


def test_train_makes_a_model_that_builds(place, capsys, tmp_path):
    plan = ("train", place / "text", "--out", tmp_path / "m", "--vocab-size", 300, "--plan")
    assert "parameters" in run_json(capsys, *plan)


def test_train_reads_binarised_text_of_fairseq(capsys, tmp_path):
    (tmp_path / "dict.txt").write_text("".join(f"w{n} {60 - n}\n" for n in range(36)))
    tokens = np.random.default_rng(1).integers(4, 40, 90)
    tokens[9::10] = 2
    lines = Lines(tokens, np.full(9, 10, np.int32))
    write_lines(tmp_path / "train", lines)
    settings = ("hidden_size=8", "layers=1", "heads=2", "block_length=8", "batch_tokens=16")
    train = ("train", tmp_path / "train.bin", "--out", tmp_path / "m", "--set", *settings)
    assert run_json(capsys, *train, "--max-steps", 2)["parameters"] > 40 * 8
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert len(tokenizer) == 40
    assert tokenizer("w3 w1")["input_ids"][:2] == [7, 5]


def test_train_follows_recipe_and_changes_and_continues(place, capsys, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('method = "trime_ext"\nmax_steps = 3\nblock_length = 8\nbatch_tokens = 16\n')
    train = ("train", place / "text", "--recipe", recipe, "--set", "warmup_steps=1")
    shape = ("hidden_size=8", "layers=1", "heads=2", "intermediate_size=8")
    new = (*train, *shape, "--out", tmp_path / "new", "--level", "word", "--seed", 2)
    assert run_json(capsys, *new)["method"] == "trime_ext"
    mine = json.loads((tmp_path / "new" / "training.json").read_text())["config"]
    assert (mine["layers"], mine["seed"], mine["max_steps"]) == (1, 2, 3)
    continued = (*train, "--model", place / "model", "--out", tmp_path / "on", "--method", "trime")
    assert run_json(capsys, *continued, "--max-steps", 2)["method"] == "trime"
    assert json.loads((tmp_path / "on" / "training.json").read_text())["steps"] == 2
    assert run(*continued, "--set", "method=ce") == 2
    assert "is set twice" in capsys.readouterr().err
    both = (*continued, "--architecture", "config.json")
    assert run(*both) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", "no-such-model", "TEXT", "--out", "OUT"), "must be a folder or Hub id"),
        (("build", "MODEL", "no-such-text", "--out", "OUT"), "no-such-text"),
        (("evaluate", "MODEL", "TEXT", "--store", "no-such-store"), "must exist"),
        (("evaluate", "MODEL", "TEXT", "--store", "STORE", "--lam", 1.5), "between 0 and 1"),
        (("evaluate", "MODEL", "TEXT", "--store", "STORE", "--k", 0), "k must be at least 1"),
        (
            ("generate", "MODEL", "TEXT", *RETOMATON, "--max-knns", 0),
            "max_knns must be at least 1",
        ),
        (("cluster", "no-such-store"), "must exist"),
        (("verify", "STORE", "--level", "deep"), "give --model and --text"),
        (("generate", "MODEL", ""), "prompt must not be empty"),
        (("generate", "MODEL", "cat", "--max-new-tokens", 0), "--max-new-tokens must be at least"),
        (("generate", "MODEL", "cat", "--beams", 0), "--beams must be at least 1, got 0"),
        (("generate", "MODEL", "cat", "--sampling-temperature", 0), "must be above 0, got 0"),
        (("generate", "MODEL", "cat", "--top-p", 2), "--top-p must be above 0 and at most 1"),
        (("evaluate", "MODEL", "TEXT", "--device", "gpu"), "the device must be auto, cpu or one"),
        (("evaluate", "MODEL", "TEXT", "--device", "cuda:9"), "torch can use here, got 'cuda:9'"),
        (("build", "MODEL", "TEXT", "--out", "OUT", "--length", 0), "length must be at least 1"),
        (("build", "MODEL", "TEXT", "--out", "OUT", "--stride", 0), "stride must lie between"),
        (("stream", "MODEL", "TEXT", "--tokens", 0), "at least 1 token to read, got 0"),
        (("stream", "MODEL", "TEXT", "--window", 0), "window must"),
        (("delete", "STORE"), "name the numbers of the documents to delete"),
    ],
)
def test_mistakes_exit_with_two_and_one_line(arguments, message, place, capsys, tmp_path):
    names = {
        "MODEL": place / "model",
        "TEXT": place / "held-out.txt",
        "STORE": place / "store",
        "OUT": tmp_path / "out",
    }
    assert run(*(names.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memlm: error: ")
    assert message in error


def test_unknown_verbs_and_options_exit_with_two(capsys):
    for arguments in (["biuld"], ["verify"], ["doctor", "--colour"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


@pytest.mark.parametrize("verb", ["build", "evaluate", "demo"])
def test_help_needs_no_heavy_module(verb):
    code = (
        "import sys\nfrom memlm.cli.main import main\n"
        f"try: main(['{verb}', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(len({'torch', 'transformers', 'faiss', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: memlm" in done.stdout
