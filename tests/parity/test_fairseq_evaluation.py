"""TRIME's evaluation from text to scores: binarised text, windows, datastore, the model alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_fairseq_models import load_case
from trime_models import UNITS, options_of

from memlm.data.windows import BlockWindows
from memlm.evaluation.perplexity import evaluate
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.formats.binarised import read_corpus
from memlm.formats.dictionary import build_dictionary, read_dictionary

PAD = 1


@pytest.fixture
def case(golden_trime_e2e_eval):
    return Case(golden_trime_e2e_eval)


class Case:
    """The files of one case folder as memlm objects."""

    def __init__(self, folder):
        self.folder = folder
        self.model = load_case(folder).model
        summary = json.loads((folder / "summary.json").read_text())
        self.datastore, self.runs = summary["datastore"], summary["runs"]
        self.binarised = folder / "data-bin"
        self.valid = read_corpus(self.binarised / "valid")

    def windows(self, run):
        """Of a run: block size is what the checkpoint's windows leave beside the context."""
        options = options_of(run["argv"])
        context = int(options["context-window"])
        block = self.model.config.max_position_embeddings - context
        return BlockWindows(block, context, UNITS[options["sample-break-mode"]])

    def scores(self, name):
        """Of every token, window after window."""
        arrays = load_file(self.folder / f"{name}.safetensors")
        count = len(self.runs[name]["samples"])
        return torch.cat([arrays[f"{number}.0.scores"] for number in range(count)]).numpy()


def test_binarised_text_is_the_text_through_the_dictionary(case):
    words = read_dictionary(case.binarised)
    assert len(words) == case.model.config.vocab_size
    for split in ("train", "valid"):
        corpus = read_corpus(case.binarised / split)
        lines = (case.folder / f"{split}.txt").read_text().splitlines()
        assert corpus.hash == words.corpus(lines).hash
        assert corpus.documents == len(lines)


def test_the_dictionary_is_made_of_the_training_text(case, tmp_path):
    lines = (case.folder / "train.txt").read_text().splitlines()
    build_dictionary(lines).save(tmp_path / "dict.txt")
    assert (tmp_path / "dict.txt").read_bytes() == (case.binarised / "dict.txt").read_bytes()


def test_windows(case):
    for name, run in case.runs.items():
        table = case.windows(run).table(case.valid)
        if not (case.folder / f"{name}.safetensors").exists():
            continue
        arrays = load_file(case.folder / f"{name}.safetensors")
        assert table.windows == len(run["samples"])
        for number in range(table.windows):
            begin, end, first = (part[number] for part in (table.begin, table.end, table.first))
            source, target = (arrays[f"{number}.{part}"][0] for part in ("src_tokens", "target"))
            assert case.valid.tokens[begin : end - 1].tolist() == source[source != PAD].tolist()
            assert case.valid.tokens[first:end].tolist() == target[target != PAD].tolist()
            assert first - 1 - begin == run["samples"][number]["start_indices"][0]


def test_the_model_alone(case):
    run = case.runs["vanilla_lm"]
    got = evaluate(case.model, case.valid, case.windows(run), keep_tokens=True, batch_tokens=256)
    assert got.token_log_probabilities is not None
    expected = case.scores("vanilla_lm")
    np.testing.assert_allclose(got.token_log_probabilities, expected, atol=1e-4)
    assert len(expected) == run["count"]
    perplexity = float(np.exp(-got.token_log_probabilities.mean()))
    assert perplexity == pytest.approx(run["perplexity"], rel=1e-4)


def test_the_datastore(case, tmp_path):
    """The original leaves out the first blocks, and what its last short block left is garbage."""
    train, plan = read_corpus(case.binarised / "train"), case.datastore
    assert len(train) - 1 == plan["train_tokens"]
    windows = BlockWindows(plan["block"], plan["context_window"], "stream")
    config = ExtractionConfig(tap="ffn_input", dtype="float32", metric="ip")
    store = build_datastore(
        case.model, None, train, tmp_path / "store", windows=windows, config=config
    )
    assert len(store) == plan["train_tokens"]
    expected = np.load(case.folder / "dstore.npz")
    rows, skipped = plan["valid_rows"], plan["skipped_first_tokens"]
    values = store.values[skipped : skipped + rows].numpy()
    np.testing.assert_array_equal(values, expected["vals"][:rows, 0])
    keys = store.load_keys()[skipped : skipped + rows].numpy()
    np.testing.assert_allclose(keys, expected["keys"][:rows], atol=1e-5)
