"""The stages of ``memlm retro`` in-process, on a few sentences and a tiny random encoder."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

import memlm
from memlm.cli.main import main
from memlm.evaluation.retro import compare_retrieval
from memlm.methods.retro import load_encoder, make_retriever
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.models.retro.fit import RetroFitForCausalLM
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.lookup import ChunkLookup
from memlm.retrieval.neighbours import NeighbourTable
from memlm.retrieval.retrievers import Bm25Retriever
from memlm.testing.tiny import tiny_model
from memlm.training.tokenizer import train_tokenizer
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


def from_neighbours(place, capsys, model, *arguments):
    """What a model continues behind a prompt of nine tokens, by name."""
    prompt = "the cat sat on the mat and the dog"
    capsys.readouterr()
    command = ["generate", str(place / model), prompt, "--max-new-tokens", "9", "--json"]
    assert main([*command, *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)["texts"]


@pytest.fixture
def reader(place, tokenizer):
    """A database, embedded, and a model in which what neighbours say matters much."""
    assert stage(place, "chunk", *chunk(place)) == 0
    encoder = ("--encoder", place / "encoder", "--tokenizer", place / "encoder")
    assert stage(place, "embed", *encoder) == 0
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    model = RetroForCausalLM(
        RetroConfig(
            **shape,
            vocab_size=len(tokenizer),
            encoder_hidden_size=16,
            chunk_size=8,
            initializer="torch",
        )
    )
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return place, model.eval()


def test_generating_with_a_database(reader, capsys, tokenizer):
    place, model = reader
    given = ("--database", place / "database")
    alone = from_neighbours(place, capsys, "model")
    both = from_neighbours(place, capsys, "model", *given, "--compare")
    assert list(both) == ["base", "RETRO"]
    assert both["base"] == alone["base"] != both["RETRO"]
    assert from_neighbours(place, capsys, "model", *given) == {"RETRO": both["RETRO"]}
    prompt = tokenizer("the cat sat on the mat and the dog", return_tensors="pt")
    database = ChunkDatabase.open(place / "database")

    def expected(retriever, k, **choice):
        lookup = ChunkLookup(retriever, k=k)
        tokens = model.generate(
            prompt["input_ids"],
            attention_mask=prompt["attention_mask"],
            retriever=lookup,
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            **choice,
        )
        return {"RETRO": tokenizer.decode(tokens[0], skip_special_tokens=True)}

    bm25 = Bm25Retriever(database)
    assert both["RETRO"] == expected(bm25, 2)["RETRO"]
    choice = ("--neighbours", 1, "--align", "right", "--retrieval-step", 3)
    found = from_neighbours(place, capsys, "model", *given, *choice)
    assert found == expected(bm25, 1, align="right", retrieval_step=3)
    encoder = load_encoder(str(place / "encoder"), tokenizer)
    for kind in ("dense", "reranked"):
        arguments = ("--retriever", kind, "--encoder", place / "encoder", "--device", "cpu")
        found = from_neighbours(place, capsys, "model", *given, *arguments)
        assert found == expected(make_retriever(database, kind, encoder), 2)


def test_generating_with_a_database_and_a_memory(reader, capsys):
    place, _ = reader
    store = ["build", str(place / "model"), str(place / "text"), "--out", str(place / "store")]
    assert main(store) == 0
    given = ("--database", place / "database", "--store", place / "store", "--k", 4, "--lam", 0.3)
    texts = from_neighbours(place, capsys, "model", *given, "--compare")
    assert list(texts) == ["base", "RETRO + kNN-LM"]
    assert texts["base"] != texts["RETRO + kNN-LM"]


def test_a_database_that_does_not_fit_is_refused(reader, capsys, tokenizer):
    place, _ = reader

    def refused(*arguments, model="model"):
        capsys.readouterr()
        assert main(["generate", str(place / model), "the cat", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    tiny_model(vocab_size=len(tokenizer)).save_pretrained(place / "plain")
    tokenizer.save_pretrained(place / "plain")
    given = ("--database", place / "database")
    assert "one that retro_fit made, got a LlamaForCausalLM" in refused(*given, model="plain")
    small = chunk(place)[:-1]
    assert main(["retro", "chunk", str(place / "small"), *map(str, small), "4"]) == 0
    assert "4 tokens, got 8" in refused("--database", place / "small")
    other = train_tokenizer(documents(4), vocab_size=280)
    other.save_pretrained(place / "other")
    text = ["--text", str(place / "text"), "--tokenizer", str(place / "other")]
    assert main(["retro", "chunk", str(place / "foreign"), *text, "--chunk-size", "8"]) == 0
    assert "must be of the tokenizer in use" in refused("--database", place / "foreign")
    assert "holds none" in refused("--database", place / "nowhere")
    assert "give --encoder" in refused(*given, "--retriever", "dense")
    assert "--neighbours, --align says how" in refused("--align", "right", "--neighbours", 3)
    long = "the cat sat on the mat and the dog"
    capsys.readouterr()
    assert (
        main(["generate", str(place / "model"), long, *map(str, given), "--neighbours", "0"]) == 2
    )
    assert "k must be at least 1, got 0" in capsys.readouterr().err


def test_evaluating_with_and_without_neighbours(reader, capsys):
    place, model = reader
    held_out = ("--text", str(place / "news"), "--tokenizer", str(place / "encoder"))
    test = place / "held-out"
    assert main(["retro", "chunk", str(test), *held_out, "--chunk-size", "8"]) == 0
    assert stage(place, "neighbours", "--text", test, "--k", 3) == 0
    asked = ("--text", test, "--model", place / "model", "--chunks-per-sequence", 2)
    found = answer(capsys, place, "evaluate", *asked)
    database, text = ChunkDatabase.open(place / "database"), ChunkDatabase.open(test)
    table = NeighbourTable.open(test / "neighbours", text, database)
    data = RetroDataset(text, table, database, chunks_per_sequence=2, k=2)
    expected = {mode: one.summary() for mode, one in compare_retrieval(model, data).items()}
    assert found["retrieval"] == expected
    assert found["overlap"][-1]["on"] == pytest.approx(expected["on"]["bits_per_byte"])
    curve = place / "curve.svg"
    assert stage(place, "evaluate", *asked, "--plot", curve) == 0
    assert "retrieval" in capsys.readouterr().out
    assert curve.exists()
    assert stage(place, "evaluate", *asked, "--k", 4) == 2
    assert "k must lie between 1 and the table's 3, got 4" in capsys.readouterr().err
    # the verb for perplexity has no neighbours, and says so
    assert main(["evaluate", str(place / "model"), str(place / "news")]) == 0
    assert "has none here; `memlm retro evaluate`" in capsys.readouterr().out


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
    found = from_neighbours(place, capsys, "fit", "--database", place / "database", "--compare")
    assert list(found) == ["base", "RETRO"]
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
    encoder = ("--encoder", place / "encoder", "--tokenizer", place / "encoder")
    for name in (("embed", *encoder), ("index",)):
        answer(capsys, place, *name)
    found = answer(capsys, place, "neighbours", "--retriever", "dense", *encoder)
    assert found["chunks"] == more["chunks"]
    keys = place / "database" / "embeddings" / "keys-00000.npy"
    data = bytearray(keys.read_bytes())
    data[-1] ^= 1
    keys.write_bytes(data)
    assert stage(place, "verify") == 1
    assert "keys-00000.npy was altered" in capsys.readouterr().out
    (place / "database" / "segment-00000.safetensors").unlink()
    assert stage(place, "verify") == 2


def test_what_is_missing_is_named(place, capsys, monkeypatch):
    assert stage(place, "neighbours") == 2
    assert "holds none; run: memlm retro chunk" in capsys.readouterr().err
    assert stage(place, "chunk", "--text", place / "text") == 2
    assert "give --tokenizer" in capsys.readouterr().err
    stage(place, "chunk", *chunk(place))
    assert stage(place, "chunk", *chunk(place)[:-1], 4) == 2
    assert "chunk_size is 4 here and 8 there" in capsys.readouterr().err
    assert stage(place, "chunk", *chunk(place)[:-1], 4, "--rebuild") == 0
    for value, done in (("0", 2), ("True", 0)):
        monkeypatch.setenv("REPROCESS", value)
        assert stage(place, "chunk", *chunk(place)) == done
    monkeypatch.delenv("REPROCESS")
    for name, wanted in (("append", "--text"), ("delete", "--names"), ("evaluate", "--model")):
        assert stage(place, name) == 2
        assert wanted in capsys.readouterr().err
    assert stage(place, "embed", "--tokenizer", place / "encoder") == 2
    assert "give --encoder" in capsys.readouterr().err
    given = ("--tokenizer", place / "encoder", "--encoder", place / "encoder")
    assert stage(place, "embed", *given, "--device", "cuda:99") == 2
    assert "torch can use here, got 'cuda:99'" in capsys.readouterr().err
    assert stage(place, "index") == 2
    assert "memlm retro embed" in capsys.readouterr().err
    assert stage(place, "neighbours", "--retriever", "dense") == 2
