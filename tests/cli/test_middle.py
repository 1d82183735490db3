"""``--middle`` of the verbs that read long texts."""

import json

import pytest

from memlm.cli.main import main
from memlm.testing.tiny import tiny_model

MIDDLE = ("--middle", 8, "--middle-block", 4, "--middle-from", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("middle")
    ids = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 1}
    settings = {"max_position_embeddings": 32, "vocab_size": len(tokenizer), **ids}
    tiny_model("llama", **settings).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = "the cat sat on the mat and the dog sat on the log a story about memory "
    (folder / "text.txt").write_text(words * 60)
    return folder


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_passkey_compares_with_and_without(place, capsys):
    ways = ("lm-infinite", "lm-infinite-middle")
    command = ("passkey", place / "model", "--lengths", 120, "--depths", 0.5, "--samples", 1,
               "--methods", *ways, "--json")  # fmt: skip
    assert run(*command, *MIDDLE) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found["methods"]) == ways
    assert found["middle"]["k"] == 8
    assert run(*command) == 2
    assert "--middle K" in capsys.readouterr().err


def test_lengths_compare_with_and_without(place, capsys):
    ways = ("lm-infinite", "lm-infinite-middle")
    command = ("evaluate", place / "model", place / "text.txt", "--length", 60, 90,
               "--pieces", 2, "--scored", 8, "--methods", *ways, "--json")  # fmt: skip
    assert run(*command, *MIDDLE, "--middle-distance", 5, "--middle-capacity", 40) == 0
    found = json.loads(capsys.readouterr().out)
    assert "8 middle tokens of the 40 behind the window" in found["protocol"]
    plain, middle = ([x["nll"] for x in found["points"] if x["method"] == method]
                     for method in ways)  # fmt: skip
    assert all(a != b for a, b in zip(plain, middle, strict=True))


def test_stream_goes_on_with_them(place, capsys):
    command = ("stream", place / "model", place / "text.txt", "--window", 16, "--chunk", 32,
               "--every", 100, "--json", *MIDDLE, "--middle-offload")  # fmt: skip
    assert run(*command, "--tokens", 400) == 0
    whole = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for tokens in (200, 400):
        assert run(*command, "--tokens", tokens, "--out", place / "run") == 0
    parts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert parts[-1]["tokens"] == whole[-1]["tokens"] == 400
    assert parts[-1]["nll"] == pytest.approx(whole[-1]["nll"], rel=1e-4)
    assert whole[-1]["cache_bytes"] > whole[0]["cache_bytes"]
    assert run(*command, "--tokens", 500, "--out", place / "run", "--middle-capacity", 64) == 2
    assert "give another folder" in capsys.readouterr().err


def test_generate_reads_a_prompt_of_any_length(place, capsys):
    prompt = "the cat sat on the mat " * 30
    command = ("generate", place / "model", prompt, "--max-new-tokens", 5, "--json")
    texts = []
    for more in ((), MIDDLE):
        assert run(*command, "--window", 16, "--sinks", 2, *more) == 0
        texts.append(json.loads(capsys.readouterr().out)["texts"]["base"])
    assert all(text.startswith("the cat") for text in texts)
    assert run(*command, *MIDDLE) == 2
    assert "give --window" in capsys.readouterr().err
