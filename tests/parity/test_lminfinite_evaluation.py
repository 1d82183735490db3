"""Evaluation gives the numbers of LM-Infinite's scripts: losses by position, streams, metrics."""

import json
from itertools import islice

import numpy as np
import pytest
from conftest import sibling
from lminfinite_models import load_model
from safetensors.torch import load_file
from transformers import AutoTokenizer

from memlm.evaluation.continuations import (
    Continuation,
    continue_at,
    rouge_of,
    score_continuations,
)
from memlm.evaluation.positions import by_document, by_length, by_position, document_losses
from memlm.evaluation.streaming import cut_chunks, shuffled_epochs
from memlm.models.extend import extend_context

LOSS = {"rtol": 1e-4, "atol": 2e-4}


def read(folder):
    return json.loads((folder / "case.json").read_text())


def prepared(folder, case):
    model = load_model(folder, "llama")
    extend_context(model, window=case["local_branch"], sinks=case["global_branch"])
    tokenizer = AutoTokenizer.from_pretrained(sibling(folder, "tokenizer"))
    return model, tokenizer


def test_losses_by_position(golden_lminfinite_nll_per_position):
    folder = golden_lminfinite_nll_per_position
    golden, arrays = read(folder), load_file(folder / "data.safetensors")
    for case in golden["cases"]:
        model, tokenizer = prepared(folder, case)
        documents = [tokenizer(text).input_ids for text in golden["documents"]]
        # in pieces, although the original reads each document at once
        losses = document_losses(model, documents, length=case["max_length"], chunk=17)
        assert len(losses) == case["num_sequences"]
        for number, row in enumerate(losses):
            np.testing.assert_allclose(row, arrays[f"{case['name']}.nll.{number}"], **LOSS)
        found = by_position(losses)
        np.testing.assert_allclose(found.mean, arrays[f"{case['name']}.token_mean"], **LOSS)
        np.testing.assert_allclose(found.variance, arrays[f"{case['name']}.token_var"], atol=1e-3)
        lengths = by_length(losses)
        assert {str(n) for n in lengths} == set(case["sequence_stats"])
        for n, expected in case["sequence_stats"].items():
            np.testing.assert_allclose(lengths[int(n)], [expected["mean"], expected["var"]], **LOSS)
        printed = float(case["printed"].split(":")[1])
        assert by_document(losses) == pytest.approx(printed, abs=2e-4)


def test_generation(golden_lminfinite_eval_generation):
    folder = golden_lminfinite_eval_generation
    golden = read(folder)
    model, tokenizer = prepared(folder, golden)
    documents = [tokenizer(text).input_ids for text in golden["documents"]]
    for run in golden["runs"]:
        written = continue_at(
            model,
            tokenizer,
            documents,
            golden["positions"],
            new_tokens=golden["max_generation_length"],
            last=run["runtime_truncation"],
        )
        assert [
            {str(at): pair._asdict() for at, pair in found.items()} for found in written
        ] == run["results"]
        check_scores(score_continuations(written, golden["positions"]), run["scores"])


def test_metrics(golden_lminfinite_generation_metrics):
    golden = read(golden_lminfinite_generation_metrics)
    written = [
        {int(at): Continuation(**pair) for at, pair in found.items()}
        for found in golden["all_results"]
    ]
    check_scores(score_continuations(written, golden["positions"]), golden["scores"])
    for at, expected in golden["per_example_rouge"].items():
        pairs = [found[int(at)] for found in written if int(at) in found]
        made = [rouge_of(Continuation(made or ".", target)) for made, target in pairs]
        assert made == [pytest.approx(row) for row in expected]


def check_scores(found, expected):
    assert {str(at) for at in found} == set(expected)
    for at, scores in found.items():
        if not expected[str(at)]:
            assert scores == {}
            continue
        assert scores["bleu"] == {
            name: pytest.approx(value, abs=1e-6)
            for name, value in expected[str(at)]["bleu"].items()
        }
        # the original's is the median of a bootstrap
        assert scores["rouge"] == pytest.approx(expected[str(at)]["rouge"], abs=0.03)


def test_stream(golden_lminfinite_streaming_loader):
    folder = golden_lminfinite_streaming_loader
    golden = read(folder)
    tokenizer = AutoTokenizer.from_pretrained(sibling(folder, "tokenizer"))
    texts = [tokenizer(t, add_special_tokens=False).input_ids for t in golden["documents"]]
    tokens = shuffled_epochs(texts, golden["seed"], begin_token=tokenizer.bos_token_id)
    chunks = islice(cut_chunks(tokens, golden["chunk_length"]), len(golden["chunks"]))
    assert list(chunks) == golden["chunks"]
