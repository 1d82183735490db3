"""kNN-LM evaluation against the original: `run_clm.py --knn` on its own datastore and index."""

import json

import numpy as np
import pytest
import torch
from conftest import sibling
from transformers import AutoModelForCausalLM

from memlm.core.merges import Mixture
from memlm.core.types import Candidates
from memlm.data.batches import IGNORED
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import StrideWindows
from memlm.evaluation.passes import Stopwatch, plan_pass
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.tune import tune
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.memory.knn import KnnMemory
from memlm.models.fingerprint import model_hash
from memlm.models.running import frozen
from memlm.ops.merge import merge_logits
from memlm.ops.tokens import token_log_scores
from memlm.store.arrays import save_arrays

TOLERANCE = 1e-5


class Golden:
    """The files of one case folder as memlm objects."""

    def __init__(self, folder, scratch):
        self.folder = folder
        self.summary = json.loads((folder / "summary.json").read_text())
        self.runs = {
            name: run["config"]
            for name, run in self.summary.items()
            if run.get("config", {}).get("kind") == "knn"
        }
        self.arrays = np.load(folder / "windows.npz")
        self.model = AutoModelForCausalLM.from_pretrained(
            sibling(folder, "tiny_gpt2"), dtype=torch.float32
        )
        self.corpus = TokenCorpus.from_tokens(self.arrays["valid_ids"])
        labels = self.arrays["labels"]
        # the second window predicts as many tokens as windows move on by
        stride = int((labels[min(1, len(labels) - 1)] != -100).sum())
        self.windows = StrideWindows(block=labels.shape[1], stride=stride)
        self.built = sibling(folder, "dstore_gpt2")
        meta = json.loads((self.built / "meta.json").read_text())
        shape = (meta["n"], meta["dim"])
        keys = np.fromfile(next(self.built.glob("*_keys.npy")), np.float16).reshape(shape)
        values = np.fromfile(next(self.built.glob("*_vals.npy")), np.int32)
        self.store = save_arrays(
            scratch / "store",
            torch.from_numpy(keys),
            torch.from_numpy(values),
            model_hash=model_hash(self.model),
            tap="ffn_input",
        )

    def memory(self, config):
        flat = config["index"] == "flat"
        if flat:
            index = ExactIndex(self.store.load_keys())
        else:
            file = next(self.built.glob("*.indexed"))
            index = FaissIndex.from_file(file, nprobe=config["probe"])
        return KnnMemory(
            self.store,
            k=config["k"],
            temperature=config["knn_temp"],
            # of an exact index: the same scores with all their digits
            recompute=flat or config.get("recompute_dists", False),
            index=index,
        )

    def evaluate(self, config=None):
        return evaluate(
            self.model,
            self.corpus,
            self.windows,
            memory=None if config is None else self.memory(config),
            merge=None if config is None else Mixture(config["lmbda"]),
            keep_tokens=True,
        )


@pytest.fixture
def golden(golden_retomaton_eval_gpt2, tmp_path):
    return Golden(golden_retomaton_eval_gpt2, tmp_path)


def test_the_model_alone(golden):
    got = golden.evaluate()
    expected = golden.arrays["base_logprob"]
    np.testing.assert_allclose(got.token_log_probabilities, expected, atol=TOLERANCE)
    base = golden.summary["base"]
    assert got.tokens == base["tokens"]
    assert got.perplexity == pytest.approx(base["ppl_token"], rel=TOLERANCE)
    batch = base.get("config", {}).get("eval_batch", 1)
    assert got.trainer_perplexity(batch) == pytest.approx(base["ppl_trainer"], rel=TOLERANCE)


def test_every_knn_run(golden):
    assert golden.runs
    for name, config in golden.runs.items():
        expected, summary = np.load(golden.folder / f"{name}.npz"), golden.summary[name]
        got = golden.evaluate(config)
        np.testing.assert_allclose(
            got.token_log_probabilities, expected["logprob"], atol=TOLERANCE, err_msg=name
        )
        assert got.perplexity == pytest.approx(summary["ppl_token"], rel=TOLERANCE), name
        trainer = got.trainer_perplexity(config["eval_batch"])
        assert trainer == pytest.approx(summary["ppl_trainer"], rel=TOLERANCE), name


def test_scores_of_the_exact_index(golden):
    """Without recomputing, the exact index's expanded distances lose some digits, no more."""
    for name, config in golden.runs.items():
        if config["index"] != "flat":
            continue
        memory = KnnMemory(golden.store, k=config["k"], temperature=config["knn_temp"])
        merge = Mixture(config["lmbda"])
        got = evaluate(golden.model, golden.corpus, golden.windows, memory=memory, merge=merge)
        assert got.perplexity == pytest.approx(golden.summary[name]["ppl_token"], rel=TOLERANCE)


def test_mixture_rows(golden):
    """The first rows over the whole vocabulary, as generation would see them."""
    checked = 0
    for name, config in golden.runs.items():
        arrays = np.load(golden.folder / f"{name}.npz")
        if "interpolated" not in arrays:
            continue
        expected = torch.from_numpy(arrays["interpolated"])
        rows, candidates = first_rows(golden, golden.memory(config), len(expected))
        merged = merge_logits(Mixture(config["lmbda"]), rows, candidates)
        got = torch.log_softmax(merged, dim=-1)
        # The original floors tokens without neighbours at exp(-10000): nothing in a mixture.
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0, msg=name)

        scores = torch.log_softmax(token_log_scores(candidates, rows.shape[1]), dim=-1)
        by_hand = torch.log_softmax(rows, -1).exp() * (1 - config["lmbda"])
        by_hand += scores.exp() * config["lmbda"]
        torch.testing.assert_close(by_hand.log(), expected, atol=TOLERANCE, rtol=0, msg=name)
        checked += 1
    assert checked


def first_rows(golden, memory, count) -> tuple[torch.Tensor, Candidates]:
    """Logits and candidates of the first scored tokens in text order."""
    plan = plan_pass(
        golden.model, golden.corpus, golden.windows, tap="ffn_input", batch_tokens=1 << 20
    )
    with frozen(golden.model):
        (scored,) = plan.run(Stopwatch(golden.model.device))
        logits = golden.model(scored.batch.input_ids).logits[scored.batch.targets != IGNORED]
        order = torch.from_numpy(np.argsort(scored.places, kind="stable"))[:count]
        return logits[order], memory.read(scored.queries[order], None)[0]


def test_tuning_reaches_the_same_numbers(golden):
    for name, config in golden.runs.items():
        got = tune(
            golden.model,
            golden.corpus,
            golden.windows,
            golden.memory(config),
            lams=(config["lmbda"],),
            temperatures=(config["knn_temp"],),
            ks=(config["k"],),
        )
        expected = golden.summary[name]["ppl_token"]
        assert got.best.perplexity == pytest.approx(expected, rel=TOLERANCE), name
        assert got.base_perplexity == pytest.approx(
            golden.summary["base"]["ppl_token"], rel=TOLERANCE
        )


def test_plain_knn_inside_the_automaton_code(golden):
    """The original's automaton with ``no_pointer`` is the same kNN-LM."""
    plain = [
        name
        for name, run in golden.summary.items()
        if run.get("config", {}).get("no_pointer") and run["config"]["index"] == "flat"
    ]
    for name in plain:
        got = golden.evaluate(golden.summary[name]["config"])
        expected = np.load(golden.folder / f"{name}.npz")["logprob"]
        np.testing.assert_allclose(got.token_log_probabilities, expected, atol=TOLERANCE)
