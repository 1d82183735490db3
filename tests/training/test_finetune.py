"""Fine-tuning: the grid, what is kept of it, every task's files."""

import json
from dataclasses import replace

import numpy as np
import pytest

from memlm.core.errors import FingerprintError, InputError
from memlm.data.glue import (
    TASKS,
    by_frequency,
    glue_task,
    predictions_name,
    read_glue,
    read_test,
    write_predictions,
)
from memlm.evaluation.glue import Counts, f1, matthews, score
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForSequenceClassification
from memlm.training.finetune import describe_table, finetune
from memlm.training.finetune_config import FinetuneConfig
from memlm.training.sentence_tokenizer import train_sentence_tokenizer

TEXT = ["the cat sat", "the dog ran", "good", "bad"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_sentence_tokenizer(TEXT * 3, 80)


def rows(task, count, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        label = int(draw.random() < 0.4)
        texts = {name: TEXT[int(draw.integers(2))] for name in task.fields}
        texts[task.fields[0]] += " good" if label else " bad"
        found.append({**texts, "label": float(5 * label) if not task.classes else label})
    return found


def make_model(tokenizer):
    return lambda labels: TupeForSequenceClassification(
        TupeConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, scheme="tupe-r", num_labels=labels,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def grid(name, tokenizer, out, **changes):
    task = glue_task(name)
    data = {split: rows(task, 48, seed) for seed, split in enumerate(("train", *task.held_out))}
    settings = {
        "learning_rates": (1e-2,), "seeds": (1,), "epochs": 8, "batch_size": 8, "max_length": 32,
        "precision": "float32", "threads": 1,
    }  # fmt: skip
    config = FinetuneConfig(task=name, **{**settings, **changes})
    return lambda make: finetune(make, tokenizer, data, config, out, quiet=True)


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_a_run(name, tokenizer, tmp_path):
    task = glue_task(name)
    table = grid(name, tokenizer, tmp_path)(make_model(tokenizer))
    assert table["best"][f"{task.held_out[0]} {task.metrics[0]}"] > 0.9
    assert set(table["best"]) == {f"{s} {m}" for s in task.held_out for m in task.metrics}


def test_a_grid(tokenizer, tmp_path, monkeypatch):
    run = grid("cola", tokenizer, tmp_path, learning_rates=(1e-2, 1e-9), seeds=(1, 2))
    table = run(make_model(tokenizer))
    assert table["best_rate"] == 1e-2
    assert table["best"]["validation matthews"] > 0.9
    assert "median of 2 seeds" in describe_table(table)
    assert not list(tmp_path.glob("*/model.safetensors"))

    def fail(*_, **__):
        raise AssertionError("a finished run must not be repeated")

    monkeypatch.setattr("memlm.training.finetune.train", fail)
    assert run(make_model(tokenizer))["medians"] == table["medians"]
    for changes in ({"epochs": 2}, {"legacy_batch_mean": True}):
        other = grid("cola", tokenizer, tmp_path, **changes)
        with pytest.raises(FingerprintError, match=f"these differ: {next(iter(changes))}"):
            other(make_model(tokenizer))
    wider = make_model(train_sentence_tokenizer([*TEXT, "another vocabulary"] * 3, 100))
    with pytest.raises(FingerprintError, match="these differ: model"):
        run(wider)


@pytest.mark.parametrize("legacy", [False, True])
def test_predictions_of_a_test_split(legacy, tokenizer, tmp_path):
    task = glue_task("rte")
    data = {split: rows(task, 48, seed) for seed, split in enumerate(("train", "validation"))}
    said = [row | {"label": -1} for row in rows(task, 30, 5)]
    data["test"] = said
    config = FinetuneConfig(
        task="rte", learning_rates=(1e-2,), seeds=(1, 2), epochs=8, batch_size=8, max_length=32,
        predict=True, legacy_classes=legacy, precision="float32", threads=1,
    )  # fmt: skip
    table = finetune(make_model(tokenizer), tokenizer, data, config, tmp_path, quiet=True)
    lines = (tmp_path / "RTE.tsv").read_text().splitlines()
    found = [line.split("\t") for line in lines]
    assert found[0] == ["index", "prediction"]
    assert [number for number, _ in found[1:]] == list(map(str, range(len(said))))
    wanted = ["not_entailment" if "good" in row["sentence1"] else "entailment" for row in said]
    assert np.mean([name == one for (_, name), one in zip(found[1:], wanted, strict=True)]) > 0.9
    best = tmp_path / f"rate-0.01-seed-{table['best_seed']}" / "RTE.tsv"
    assert best.read_text().splitlines() == lines


def test_classes_by_frequency():
    assert by_frequency(np.array([1, 1, 0, 2, 2, 2])).tolist() == [2, 1, 0]
    assert by_frequency(np.array([0, 1])).tolist() == [0, 1]


def test_pooled_metrics_are_not_means_of_batches():
    predicted, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 0, 1])
    pooled = score(["accuracy", "f1", "matthews"], predicted, labels)
    assert pooled == pytest.approx({"accuracy": 0.8, "f1": 0.8, "matthews": 2 / 3})
    legacy = score(["accuracy"], predicted, labels, legacy_batches=2)
    assert legacy["accuracy"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert (f1(Counts(0, 0, 0, 4)), matthews(Counts(0, 0, 0, 4))) == (0.0, 0.0)
    with pytest.raises(InputError, match="one prediction per label"):
        score(["f1"], predicted, labels[:2])
    with pytest.raises(InputError, match="a metric must be one of"):
        score(["bleu"], predicted, labels)


WIDTHS = {
    "cola": 4,
    "sst2": 2,
    "mrpc": 5,
    "qqp": 6,
    "stsb": 10,
    "mnli": 12,
    "qnli": 4,
    "rte": 4,
    "wnli": 4,
}


@pytest.mark.parametrize("name", list(TASKS))
def test_official_files(name, tmp_path):
    task = glue_task(name)
    fields = [f"f{number}" for number in range(WIDTHS[name])]
    label = task.classes[1] if task.classes else "2.500"
    fields[task.label_column] = label
    for number, column in enumerate(task.columns):
        fields[column] = f'text "{number}'
    heading = ["\t".join(["head"] * WIDTHS[name])] if task.header else []
    for file in ("train.tsv", "dev.tsv", "dev_matched.tsv", "dev_mismatched.tsv"):
        (tmp_path / file).write_text("\n".join([*heading, "\t".join(fields), ""]))
    for split in ("train", *task.held_out):
        found = read_glue(task, tmp_path, split)
        assert found.texts == [tuple(f'text "{n}' for n in range(len(task.columns)))]
        assert found.labels.tolist() == ([1] if task.classes else [0.5])


TEST_FILES = {  # texts in the official files without labels
    "cola": [("test", 2, (1,))],
    "sst2": [("test", 2, (1,))],
    "mrpc": [("test", 5, (3, 4))],
    "qqp": [("test", 3, (1, 2))],
    "stsb": [("test", 9, (7, 8))],
    "mnli": [("test_matched", 10, (8, 9)), ("test_mismatched", 10, (8, 9))],
    "qnli": [("test", 3, (1, 2))],
    "rte": [("test", 3, (1, 2))],
    "wnli": [("test", 3, (1, 2))],
}
SUBMITTED = {
    "CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "STS-B.tsv", "MNLI-m.tsv", "MNLI-mm.tsv",
    "QNLI.tsv", "RTE.tsv", "WNLI.tsv",
}  # fmt: skip


@pytest.mark.parametrize("name", list(TASKS))
def test_official_test_files(name, tmp_path):
    task = glue_task(name)
    (tmp_path / "train.tsv").touch()  # as official folders are told
    assert task.test == tuple(split for split, *_ in TEST_FILES[name])
    for split, width, columns in TEST_FILES[name]:
        fields = [f"f{number}" for number in range(width)]
        for number, column in enumerate(columns):
            fields[column] = f"text {number}"
        lines = ["\t".join(["head"] * width), "\t".join(fields), "\t".join(fields), ""]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines))
        texts = tuple(f"text {number}" for number in range(len(columns)))
        assert read_test(task, tmp_path, split) == [texts, texts]


def test_files_of_predictions(tmp_path):
    names = {predictions_name(task, split) for task in TASKS.values() for split in task.test}
    assert names == SUBMITTED
    write_predictions(tmp_path / "a", np.array([1, 0]), ["no", "yes"])
    assert (tmp_path / "a").read_text() == "index\tprediction\n0\tyes\n1\tno\n"
    write_predictions(tmp_path / "b", np.array([0.5, 1.2, -0.1]), [])
    assert (tmp_path / "b").read_text().split() == [
        "index", "prediction", "0", "2.500", "1", "5.000", "2", "0.000",
    ]  # fmt: skip


def test_similarities_before_glue(tmp_path):
    import lzma

    for name in ("sts-train.csv.xz", "sts-dev.csv.xz", "sts-test.csv.xz"):
        line = 'main\tfile\t2012\t0001\t5.000\tA plane.\tAn "air" plane.\tsource'
        (tmp_path / name).write_bytes(lzma.compress(line.encode()))
    found = read_glue(glue_task("STS-B"), tmp_path, "validation")
    assert (found.texts, found.labels.tolist()) == ([("A plane.", 'An "air" plane.')], [1.0])
    assert read_test(glue_task("stsb"), tmp_path, "test") == found.texts


def test_saved_data_sets(tmp_path):
    import datasets

    task = glue_task("MRPC")
    made = {split: datasets.Dataset.from_list(rows(task, 3)) for split in ("train", "validation")}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "mrpc")
    found = read_glue(task, tmp_path / "mrpc", "validation")
    assert len(found.texts) == 3
    assert all(len(pair) == 2 for pair in found.texts)


def test_a_task_of_ones_own_may_have_labels_in_its_test_split():
    task = replace(glue_task("RTE"), held_out=("test",))
    found = read_glue(task, {"test": rows(task, 4)}, "test")
    assert found.labels.tolist() == [row["label"] for row in rows(task, 4)]
    assert task.test == ()


def test_labels_are_checked(tmp_path):
    (tmp_path / "train.tsv").write_text("id\ta\tb\tlabel\n1\tx\ty\tmaybe\n")
    with pytest.raises(InputError, match="must be one of entailment, not_entailment, got 'maybe'"):
        read_glue(glue_task("RTE"), tmp_path, "train")
    with pytest.raises(InputError, match=r"must hold dev\.tsv for split"):
        read_glue(glue_task("RTE"), tmp_path, "validation")
    (tmp_path / "train.tsv").write_text("id\ta\tb\tlabel\n1\tx\n")
    with pytest.raises(InputError, match=r"line 2 of .* must have at least 4 fields, got 2"):
        read_glue(glue_task("RTE"), tmp_path, "train")
    with pytest.raises(InputError, match="labels of stsb must be numbers"):
        read_glue(
            glue_task("stsb"),
            {"train": [{"sentence1": "", "sentence2": "", "label": "x"}]},
            "train",
        )
    with pytest.raises(InputError, match="must have the field 'sentence2'"):
        read_glue(glue_task("rte"), {"train": [{"sentence1": "", "label": 0}]}, "train")
    with pytest.raises(InputError, match="must have a split 'train', got dev"):
        read_glue(glue_task("rte"), {"dev": []}, "train")
    with pytest.raises(InputError, match="task must be one of"):
        glue_task("squad")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"must be a folder with train\.tsv, a folder that"):
        read_glue(glue_task("rte"), tmp_path / "empty", "train")


def test_the_protocol():
    config = FinetuneConfig(task="cola")
    run = config.run(glue_task(config.task), 320, 2e-5, 1)
    assert (run.max_steps, run.warmup_steps, run.rows) == (100, 6, 32)
    assert json.dumps(config.to_dict())
    with pytest.raises(InputError, match="learning_rates must hold at least one"):
        FinetuneConfig(task="cola", learning_rates=())
    with pytest.raises(InputError, match="max_length must be at least 4, got 3"):
        FinetuneConfig(task="cola", max_length=3)
    with pytest.raises(InputError, match="epochs must be at least 1, got 0"):
        FinetuneConfig(task="cola", epochs=0)
    with pytest.raises(InputError, match="warmup_ratio must lie"):
        FinetuneConfig(task="cola", warmup_ratio=1.5)
