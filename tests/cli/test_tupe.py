"""``memlm finetune`` and ``memlm positions`` from the command line."""

import json

import pytest

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
    for name in ("train", "dev"):
        lines = [f"x\t{n % 2}\t\t{'good' if n % 2 else 'bad'} cats" for n in range(8)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
    command = ["finetune", str(encoder), "--task", "cola", "--data", str(tmp_path)]
    command += ["--out", str(tmp_path / "runs"), "--learning-rates", "1e-3", "--seeds", "1", "2"]
    command += ["--epochs", "1", "--batch-size", "4", "--threads", "1"]
    assert main([*command, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["config"]["max_length"] == 32
    assert len(table["runs"]) == 2
    assert main(command) == 0
    assert "median of 2 seeds" in capsys.readouterr().out


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
