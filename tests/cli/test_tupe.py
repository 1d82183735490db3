"""``memlm finetune`` and ``memlm positions`` from the command line."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from memlm.cli.main import main
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForMaskedLM
from memlm.training.sentence_tokenizer import train_sentence_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_sentence_tokenizer(["good and bad cats sat on the mat"] * 3, 64)
    config = TupeConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, scheme="tupe-r",
    )  # fmt: skip
    TupeForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_finetune(encoder, tmp_path, capsys):
    write_samples(tmp_path)
    command = ["finetune", str(encoder), "--task", "cola", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--learning-rates", "1e-3", "--seeds", "1", "2"]
    command += ["--epochs", "1", "--batch-size", "4", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["config"]["max_length"] == 32
    assert len(table["runs"]) == 2
    assert main(command) == 0
    assert "median of 2 seeds" in capsys.readouterr().out


def write_samples(folder):
    for name in ("train", "dev"):
        lines = [f"x\t{n % 2}\t\t{'good' if n % 2 else 'bad'} cats" for n in range(8)]
        (folder / f"{name}.tsv").write_text("\n".join(lines))


def test_any_encoder_is_finetuned_and_predicts(encoder, tmp_path, capsys):
    write_samples(tmp_path)
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tgood cats\n1\tbad cats\n")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    command = ["finetune", str(tmp_path / "bert"), "--task", "CoLA", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--learning-rates", "1e-2", "--seeds", "1"]
    command += ["--epochs", "1", "--batch-size", "4", "--threads", "1", "--predict"]
    assert main(command) == 0
    assert f"predicted: {tmp_path}/runs/CoLA.tsv" in capsys.readouterr().out
    lines = (tmp_path / "runs" / "CoLA.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line[:2] for line in lines[1:]] == ["0\t", "1\t"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--task": "squad"}, "task must be one of cola"),
        ({"--data": "nowhere"}, "nowhere must be a folder with train.tsv"),
        ({"--max-length": "64"}, "max_length must be at most what the model can read, 32, got 64"),
        ({"--max-length": "0"}, "max_length must be at least 4, got 0"),
        ({"--learning-rates": "0"}, "learning_rate must be above zero"),
        ({"--predict": ""}, "must hold test.tsv for split 'test'"),
        ({"": "none"}, "the model must be a folder or Hub id that AutoModel loads"),
        ({"": "bare"}, "has none that loads (a TUPE tokenizer must have its files"),
    ],
)
def test_what_is_wrong_is_said(changes, message, encoder, tmp_path, capsys):
    write_samples(tmp_path)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(encoder / name, tmp_path / "bare" / name)
    options = {
        "--task": "cola", "--data": str(tmp_path), "--out": str(tmp_path / "runs"),
        "--learning-rates": "1e-3", "--seeds": "1", "--threads": "1",
    }  # fmt: skip
    model = str(tmp_path / changes.pop("") if "" in changes else encoder)
    given = [part for pair in (options | changes).items() for part in pair if part]
    assert main(["finetune", model, *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("memlm: error: ")
    assert said.count("\n") == 1


def test_positions(encoder, tmp_path, capsys):
    picture = tmp_path / "maps.png"
    assert main(["positions", str(encoder), "--length", "16", "--out", str(picture)]) == 0
    assert "head 0: global" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    assert main(["positions", str(tmp_path / "nothing")]) == 2
    assert "the model must be a folder or Hub id that AutoModel loads" in capsys.readouterr().err
    assert main(["positions", str(encoder), "--length", "2"]) == 2
    assert "length must be at least 3" in capsys.readouterr().err


def test_pretraining(tmp_path, capsys):
    names = ("Ada", "Ben", "Cleo", "Dan")
    lines = [
        f"{one} walked with {two} along the river until the sun went down, and {three} came too."
        for one in names for two in names for three in names
    ]  # fmt: skip
    (tmp_path / "text.txt").write_text("\n".join(lines))
    command = ["train", str(tmp_path / "text.txt"), "--method", "tupe", "--vocab-size", "96"]
    command += ["--out", str(tmp_path / "model"), "--max-steps", "2", "--threads", "1", "--set"]
    command += ["scheme=tupe-a", "layers=1", "hidden_size=16", "heads=2", "block_length=48"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lines"]["read"] == found["lines"]["once"] == 64
    assert TupeForMaskedLM.from_pretrained(tmp_path / "model").config.scheme == "tupe-a"
    assert main([*command[:2], "--method", "tupe", "--out", "x", "--preset", "base", "--plan"]) == 0
    assert "12 layers of 768" in capsys.readouterr().out
    assert main([*command[:2], "--method", "tupe", "--out", "x", "--model", "gpt2"]) == 2
    assert "does not read --model" in capsys.readouterr().err
