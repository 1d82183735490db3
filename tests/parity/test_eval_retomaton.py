"""RetoMaton evaluation step by step against the original: every trace of `run_clm.py --retomaton`.

The original resets its state at every forward call and walks the rows of a call as one sequence.
Here each call is a row of one batch, shorter calls padded on the right and masked.
"""

import json

import numpy as np
import pytest
import torch
from conftest import sibling
from transformers import AutoModelForCausalLM
from walking import Walk, ragged

from memlm.core.merges import Mixture
from memlm.core.types import TargetPartial
from memlm.formats.members import read_members
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.index.partition import Clusters
from memlm.memory.automaton import AutomatonMemory
from memlm.ops.merge import merge_logits, mixture
from memlm.store.arrays import save_arrays

TOLERANCE = 1e-5


class Golden:
    """The files of one case folder as memlm objects."""

    def __init__(self, folder, scratch):
        self.folder = folder
        summary = json.loads((folder / "summary.json").read_text())
        self.runs = {
            name: run
            for name, run in summary.items()
            if run.get("config", {}).get("kind") == "reto"
        }
        self.windows = np.load(folder / "windows.npz")
        self.base = torch.from_numpy(self.windows["base_logprob"])
        files = [np.load(folder / f"{name}.npz") for name in self.runs]
        self.queries = next(torch.from_numpy(f["queries"]) for f in files if "queries" in f)
        self.built = sibling(folder, "dstore_gpt2")
        meta = json.loads((self.built / "meta.json").read_text())
        keys = np.fromfile(next(self.built.glob("*_keys.npy")), np.float16)
        values = np.fromfile(next(self.built.glob("*_vals.npy")), np.int32)
        self.store = save_arrays(
            scratch / "store",
            torch.from_numpy(keys.reshape(meta["n"], meta["dim"])),
            torch.from_numpy(values),
        )
        pickled = next(sibling(folder, "kmeans_members").glob("members_*.pkl"))
        self.clusters = Clusters.from_members(*read_members(pickled)[:2], entries=meta["n"])

    def memory(self, config):
        flat = config["index"] == "flat"
        if flat:
            index = ExactIndex(self.store.load_keys())
        else:
            index = FaissIndex.from_file(next(self.built.glob("*.indexed")), nprobe=config["probe"])
        none = torch.full((len(self.store),), -1)
        return AutomatonMemory(
            self.store,
            k=config["k"],
            temperature=config["knn_temp"],
            min_knns=config.get("min_knns", 1),
            max_knns=config.get("max_knns", 1024),
            clusters=self.clusters if config.get("members") else None,
            multiplicity="legacy",
            successors=none if config.get("no_pointer") else "all",
            scores="exact" if flat else "index",
            index=index,
        )


@pytest.fixture
def golden(golden_retomaton_eval_gpt2, tmp_path):
    return Golden(golden_retomaton_eval_gpt2, tmp_path)


def test_every_trace(golden):
    assert golden.runs
    for name, run in golden.runs.items():
        config, arrays = run["config"], np.load(golden.folder / f"{name}.npz")
        labels = torch.from_numpy(arrays["label"]).long()
        walk = Walk(golden.memory(config), golden.queries, labels, arrays["reset_at"].tolist())

        np.testing.assert_array_equal(walk.searched, arrays["searched"], name)
        counts = [len(pointers) for pointers in walk.pointers]
        np.testing.assert_array_equal(counts, arrays["n_pointers"], name)
        for kind, got in (
            ("pointers", walk.pointers),
            ("extended", walk.extended),
            ("knns", walk.knns),
        ):
            for step, (mine, expected) in enumerate(zip(got, ragged(arrays, kind), strict=True)):
                np.testing.assert_array_equal(
                    np.sort(mine), np.sort(expected), f"{name}: {kind} at step {step}"
                )
        for step, expected in enumerate(ragged(arrays, "neg_dist")):
            np.testing.assert_allclose(
                np.sort(walk.scores[step]),
                np.sort(expected),
                rtol=1e-4,
                atol=1e-5,
                err_msg=f"{name}: distances at step {step}",
            )

        base = TargetPartial(torch.zeros(len(labels)), golden.base)
        mixed = mixture(config["lmbda"], base, walk.partial)
        got = (mixed.target_lse - mixed.lse).numpy()
        np.testing.assert_allclose(got, arrays["logprob"], atol=TOLERANCE, err_msg=name)
        perplexity = float(np.exp(-got.astype(np.float64).mean()))
        assert perplexity == pytest.approx(run["ppl_token"], rel=TOLERANCE), name

        assert walk.stats["steps"] == run["steps"], name
        assert walk.stats["searches"] == run["searches"], name
        assert walk.stats["saved"] == pytest.approx(run["foss_true"], abs=1e-12), name
        assert walk.stats["foss_legacy"] == pytest.approx(run["foss_reported"], abs=1e-12), name


def test_mixture_rows(golden):
    """The first rows over the whole vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(
        sibling(golden.folder, "tiny_gpt2"), dtype=torch.float32
    )
    windows = {name: torch.from_numpy(a) for name, a in golden.windows.items()}
    with torch.no_grad():
        logits = model.eval()(windows["input_ids"]).logits[:, :-1]
    logits = logits[windows["labels"][:, 1:] != -100]
    checked = 0
    for name, run in golden.runs.items():
        config, arrays = run["config"], np.load(golden.folder / f"{name}.npz")
        if "interpolated" not in arrays:
            continue
        expected = torch.from_numpy(arrays["interpolated"])
        labels = torch.from_numpy(arrays["label"]).long()
        walk = Walk(golden.memory(config), golden.queries, labels, arrays["reset_at"].tolist())
        got = torch.cat(
            [
                merge_logits(Mixture(config["lmbda"]), logits[step : step + 1], candidates)
                for step, candidates in enumerate(walk.candidates[: len(expected)])
            ]
        )
        torch.testing.assert_close(
            torch.log_softmax(got, -1), expected, atol=TOLERANCE, rtol=0, msg=name
        )
        checked += 1
    assert checked
