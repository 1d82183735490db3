"""The tasks of LM-Infinite's scripts: data, prompts, truncation and scores, to the letter."""

import json

import pytest
from conftest import sibling
from transformers import AutoTokenizer

from memlm.data.passkey import INSTRUCTION, ORIGINAL_SUFFIX, SENTENCES, original_passkeys
from memlm.evaluation.answers import answer_f1, mean_f1, normalise_answer
from memlm.evaluation.passkey import passkey_accuracy


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
