"""The stages of ``memlm retro`` in-process, on a few sentences and a tiny random encoder."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

import memlm
from memlm.cli.main import main
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.fit import RetroFitForCausalLM
from memlm.testing.tiny import tiny_model
from tests.retrieval.texts import documents


@pytest.fixture
def place(tmp_path, tokenizer):
    for folder, count in (("text", 8), ("news", 10)):
        (tmp_path / folder).mkdir()
        for document in documents(count, seed=count)[count - 8 :]:
            (tmp_path / folder / f"{folder}-{document.name}.txt").write_text(document.text)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path


def stage(place, name, *arguments):
    return main(["retro", name, str(place / "database"), *map(str, arguments)])


def answer(capsys, place, name, *arguments):
    capsys.readouterr()
    assert stage(place, name, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def chunk(place):
    return ("--text", place / "text", "--tokenizer", place / "encoder", "--chunk-size", 8)


def test_from_text_to_neighbours(place, capsys):
    plan = answer(capsys, place, "chunk", *chunk(place), "--plan")
    assert not (place / "database").exists()
    made = answer(capsys, place, "chunk", *chunk(place))
    assert made["documents"] == plan["documents"] == 8
    assert answer(capsys, place, "chunk", *chunk(place)) == made

    found = answer(capsys, place, "neighbours", "--k", 3)
    assert (found["chunks"], found["k"]) == (made["chunks"], 3)
    assert found["retriever"]["retriever"] == "bm25"

    encoder = ("--encoder", place / "encoder", "--tokenizer", place / "encoder")
    embedded = answer(capsys, place, "embed", *encoder)
    assert (embedded["chunks"], embedded["dim"]) == (made["chunks"], 16)
    assert "exact search" in answer(capsys, place, "index", "--plan")["text"]
    assert answer(capsys, place, "index")["engine"] == "exact"
    for retriever in ("dense", "reranked"):
        arguments = ("--k", 2, "--retriever", retriever, "--rebuild", *encoder)
        found = answer(capsys, place, "neighbours", *arguments)
        assert found["retriever"]["retriever"] == retriever
        assert found["empty"] == 0

    seen = answer(capsys, place, "inspect", "--tokenizer", place / "encoder", "--chunks", 0, 2)
    assert [len(one["passages"]) for one in seen["chunks"]] == [2, 2]
    assert stage(place, "inspect", "--tokenizer", place / "encoder") == 0
    assert "neighbour 2" in capsys.readouterr().out
    page = place / "page.html"
    assert stage(place, "inspect", "--tokenizer", place / "encoder", "--html", page) == 0
    assert page.read_text().startswith("<!doctype html>")


def test_training(place, capsys):
    for folder, name in (("text", "database"), ("news", "held-out")):
        text = ("--text", str(place / folder), "--chunk-size", "8")
        tokenizer = ("--tokenizer", str(place / "encoder"))
        assert main(["retro", "chunk", str(place / name), *text, *tokenizer]) == 0
    assert stage(place, "neighbours") == 0
    assert stage(place, "neighbours", "--text", place / "held-out") == 0
    command = ["train", str(place / "database"), "--method", "retro", "--out", str(place / "model")]
    shape = ["block_length=16", "batch_tokens=64", "hidden_size=16", "layers=2", "heads=2"]
    rest = ["--max-steps", "2", "--threads", "1", "--json"]
    capsys.readouterr()
    assert main([*command, "--plan", *rest, "--set", *shape]) == 0
    assert json.loads(capsys.readouterr().out)["step_tokens"] == 64
    assert not (place / "model").exists()
    assert main([*command, *rest, "--set", *shape]) == 2
    assert "give --tokenizer" in capsys.readouterr().err
    rest += ["--tokenizer", str(place / "encoder"), "--evaluate-on", str(place / "held-out")]
    assert main([*command, *rest, "--set", *shape]) == 0
    made = json.loads(capsys.readouterr().out)
    assert list(made["retrieval"]) == ["on", "off", "shuffled"]
    assert RetroForCausalLM.from_pretrained(place / "model").config.chunk_size == 8
    assert main(["generate", str(place / "model"), "the", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("the")
    command[-1] = str(place / "more")
    assert main([*command, *rest, "--model", str(place / "model"), "--set", *shape[:2]]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == made["parameters"]
    assert main([*command, "--chain", "x"]) == 2
    assert "does not read --chain" in capsys.readouterr().err
    assert main([*command, "--preset", "base", "--plan"]) == 0
    assert "524,288 tokens per step" in capsys.readouterr().out


def test_fitting_a_trained_model(place, capsys, tokenizer):
    base = tiny_model(vocab_size=len(tokenizer))
    base.save_pretrained(place / "base")
    tokenizer.save_pretrained(place / "base")
    assert stage(place, "chunk", *chunk(place)) == 0
    assert stage(place, "neighbours") == 0
    command = ["train", str(place / "database"), "--method", "retro", "--model"]
    rest = ["--max-steps", "2", "--threads", "1", "--json"]
    rest += ["--set", "block_length=16", "batch_tokens=64"]
    assert main([*command, str(place / "base"), "--out", str(place / "fit"), *rest]) == 0
    fit = RetroFitForCausalLM.from_pretrained(place / "fit")
    for name, value in base.state_dict().items():
        assert torch.equal(fit.base.state_dict()[name], value), name
    assert all(bool(gate != 0) for gate in fit.gates.values())
    assert main([*command, str(place / "fit"), "--out", str(place / "more"), *rest]) == 0

    def written(folder):
        capsys.readouterr()
        prompt = ("the", "--max-new-tokens", "3", "--json")
        assert main(["generate", str(place / folder), *prompt]) == 0
        return json.loads(capsys.readouterr().out)["texts"]

    assert written("fit") == written("base")  # nothing is retrieved
    nameless = memlm.retro_fit(base, chunk_size=8)
    base.config.name_or_path = ""
    nameless.save_pretrained(place / "nameless")
    assert main(["generate", str(place / "nameless"), "the"]) == 2
    assert "belongs to a base model without a name" in capsys.readouterr().err


def test_editing(place, capsys):
    made = answer(capsys, place, "chunk", *chunk(place))
    news = ("--text", place / "news", "--tokenizer", place / "encoder")
    more = answer(capsys, place, "append", *news)
    assert more["documents"] == 16
    assert more["chunks"] > made["chunks"]
    name = next((place / "news").iterdir()).name
    assert answer(capsys, place, "delete", "--names", name)["deleted"] == 1
    assert answer(capsys, place, "verify") == {"problems": []}
    (place / "database" / "segment-00000.safetensors").unlink()
    assert stage(place, "verify") == 2


def test_what_is_missing_is_named(place, capsys):
    assert stage(place, "neighbours") == 2
    assert "holds none; run: memlm retro chunk" in capsys.readouterr().err
    assert stage(place, "chunk", "--text", place / "text") == 2
    assert "give --tokenizer" in capsys.readouterr().err
    stage(place, "chunk", *chunk(place))
    assert stage(place, "chunk", *chunk(place)[:-1], 4) == 2
    assert "chunk_size is 4 here and 8 there" in capsys.readouterr().err
    assert stage(place, "chunk", *chunk(place)[:-1], 4, "--rebuild") == 0
    for name, wanted in (("append", "--text"), ("delete", "--names"), ("embed", "--encoder")):
        assert stage(place, name) == 2
        assert wanted in capsys.readouterr().err
    assert stage(place, "index") == 2
    assert "memlm retro embed" in capsys.readouterr().err
    assert stage(place, "neighbours", "--retriever", "dense") == 2
