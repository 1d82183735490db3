"""The tasks of LM-Infinite's scripts: data, prompts, truncation and scores, to the letter."""

import json
import re

import numpy as np
import pytest
from conftest import sibling
from transformers import AutoTokenizer

from memlm.data.passkey import INSTRUCTION, ORIGINAL_SUFFIX, SENTENCES, original_passkeys
from memlm.data.pile import read_pile, split_pile
from memlm.data.qasper import read_qasper
from memlm.evaluation.answers import answer_f1, mean_f1, normalise_answer
from memlm.evaluation.curves import score_bound, smooth
from memlm.evaluation.passkey import passkey_accuracy
from memlm.evaluation.positions import truncate


def read(folder):
    return json.loads((folder / "case.json").read_text())


def tokenizer_of(folder):
    return AutoTokenizer.from_pretrained(sibling(folder, "tokenizer"))


def test_passkey_data(golden_lminfinite_passkey):
    golden, tokenizer = read(golden_lminfinite_passkey), tokenizer_of(golden_lminfinite_passkey)
    assert golden["task_prefix"] == INSTRUCTION
    assert golden["distractor"] == " ".join(SENTENCES)
    assert golden["eval_prompt_suffix"] == ORIGINAL_SUFFIX
    for run in golden["runs"]:
        made = original_passkeys(
            tokenizer, run["token_length"], run["num_samples"], first_half=run["first_half"]
        )
        assert [text.key for text in made] == run["targets"]
        assert [text.before for text in made] == run["insert_locations"]
        assert {text.paragraphs for text in made} == {run["num_distractors"]}
        if run["actual_token_lengths"] is not None:
            lengths = [len(tokenizer.encode(text.text)) for text in made]
            assert lengths == run["actual_token_lengths"]
        for text, expected in zip(made, run.get("samples") or [], strict=False):
            assert {"input": text.text, "target": text.key} == expected


def test_passkey_accuracy(golden_lminfinite_passkey):
    for case in read(golden_lminfinite_passkey)["accuracy"]:
        predictions = case.get("predictions") or [case["prediction"]]
        references = case.get("references") or [case["reference"]]
        expected = case["result"]["accuracy"]
        assert passkey_accuracy(predictions, references) == pytest.approx(expected)


def test_f1(golden_lminfinite_qasper_f1):
    golden = read(golden_lminfinite_qasper_f1)
    for text, expected in golden["normalize"]:
        assert normalise_answer(text) == expected
    for case in golden["single"]:
        assert answer_f1(case["prediction"], case["references"]) == pytest.approx(case["f1"])
    pairs = [(case["prediction"], case["references"]) for case in golden["single"]]
    assert mean_f1(*zip(*pairs, strict=True)) == pytest.approx(golden["compute_f1"])


def test_prompts(golden_lminfinite_qasper_f1):
    golden = read(golden_lminfinite_qasper_f1)
    for name, style in (("qasper", "chat"), ("qasper_plain", "plain")):
        made = read_qasper(golden["documents"], style=style)
        expected = [
            (row["prompt"], tuple(row["target"]), row["id"]) for row in golden["examples"][name]
        ]
        assert [(row.prompt, row.references, row.document) for row in made] == expected


def test_truncation(golden_lminfinite_tokenize_truncation):
    folder = golden_lminfinite_tokenize_truncation
    golden, tokenizer = read(folder), tokenizer_of(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    for case in golden["cases"]:
        texts = case.get("texts") or [golden["text"]]
        padded = tokenizer(texts, padding=True)
        for name in ("input_ids", "attention_mask"):
            expected = case[name] if case.get("batch") else [case[name]]
            rule = case["max_length"], case["truncation_side"]
            assert [truncate(row, *rule) for row in padded[name]] == expected


def test_subsets(golden_lminfinite_pile_dataset, tmp_path):
    golden = read(golden_lminfinite_pile_dataset)
    raw = tmp_path / "raw.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in golden["raw_jsonl"]))
    split_pile(raw, tmp_path / "split")
    written = {path.name: path.read_text() for path in (tmp_path / "split").iterdir()}
    assert written == golden["split_files"]
    for name, expected in golden.items():
        if name in ("raw_jsonl", "split_files"):
            continue
        subset, _, rest = name.partition("_")
        limit, start = (
            int(found[1]) if (found := re.search(rf"{word}(\d+)", rest)) else None
            for word in ("max", "from")
        )
        documents = read_pile(tmp_path / "split" / f"{subset}.jsonl", start=start, limit=limit)
        assert [document.text for document in documents] == expected


def test_curves(golden_lminfinite_visualization_numbers):
    golden = read(golden_lminfinite_visualization_numbers)
    losses, scores = golden["plot_nll"], golden["attention_explosion"]
    found = smooth(losses["token_means"], losses["gamma"], rule="original")
    np.testing.assert_allclose(found, losses["smoothed"], rtol=1e-10)
    bound = score_bound(scores["last_token_logits"])
    np.testing.assert_allclose(bound.rows, scores["running_max"], rtol=1e-6)
    np.testing.assert_allclose(bound.mean, scores["mean"], rtol=1e-5)
    np.testing.assert_allclose(bound.deviation, scores["std_ddof1"], rtol=1e-5)
