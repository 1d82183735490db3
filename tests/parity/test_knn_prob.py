"""The kNN distribution and the supplied FAISS index give the numbers of the original code.

Golden `knn_prob`: knn-transformers (rows over the vocabulary, any temperature and lambda) and the
fairseq fork (the target only, temperature 1). `dstore_gpt2`: a FAISS IVF-PQ file of the original.
Two things of the originals are not reproduced: a token without neighbours has probability zero
instead of e^-10000, and knn-transformers' negated dot products.
"""

import json

import numpy as np
import pytest
import torch
from conftest import sibling
from index.stores import MemoryStore
from torch.testing import assert_close

from memlm.core.merges import Mixture
from memlm.core.types import TargetPartial
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.faiss_index import FaissIndex
from memlm.index.plan import IndexConfig
from memlm.memory.knn import KnnMemory
from memlm.ops.merge import merge_logits, merge_target
from memlm.ops.tokens import token_log_scores

# What the originals write for probability zero.
FLOOR = -10_000.0
ATOL = 1e-4


class Case:
    def __init__(self, folder):
        self.meta = json.loads((folder / "meta.json").read_text())
        arrays = np.load(folder / "arrays.npz")
        self.arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.queries = self.arrays["queries"]
        self.base = self.arrays["lm_logprobs"]
        self.targets = self.arrays["targets"]
        self.vocab = self.base.shape[1]

    def memory(self, index="exact", metric="l2", **settings):
        store = MemoryStore(self.arrays["keys"], self.arrays["vals"].reshape(-1), metric, shard=130)
        if index == "exact":
            index = ExactIndex(store, metric)
        elif index == "flat":
            index = build_index(store, IndexConfig(type="flat", metric=metric, recall_queries=0))
        return KnnMemory(store, k=self.meta["k"], index=index, **settings)

    def check_rows(self, rows, expected):
        empty = expected <= FLOOR / 2
        assert torch.equal(torch.isneginf(rows), empty)
        assert_close(rows[~empty], expected[~empty], rtol=0, atol=ATOL)


@pytest.fixture
def case(golden_retomaton_knn_prob):
    return Case(golden_retomaton_knn_prob)


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_exact_search_finds_the_same_neighbours(case, index):
    found = case.memory(index).index.search(case.queries, case.meta["k"])
    assert torch.equal(found.ids, case.arrays["l2_ids"])
    assert_close(-found.scores, case.arrays["l2_dist"], rtol=1e-4, atol=ATOL)


def test_recomputed_distances_are_the_same(case):
    candidates, _ = case.memory(recompute=True).read(case.queries, None)
    recomputed = case.arrays["l2_recomputed"].gather(
        1, _places(candidates.ids, case.arrays["l2_ids"])
    )
    assert_close(-candidates.scores, recomputed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_distributions_at_every_temperature(case, index):
    for temperature in case.meta["temps"]:
        memory = case.memory(index, temperature=temperature)
        candidates, _ = memory.read(case.queries, None)
        rows = torch.log_softmax(token_log_scores(candidates, case.vocab), dim=-1)
        case.check_rows(rows, case.arrays[f"hf_l2_T{temperature}_knn_logprob"])


@pytest.mark.parametrize("index", ["exact", "flat"])
def test_mixtures_at_every_temperature_and_lambda(case, index):
    for temperature in case.meta["temps"]:
        memory = case.memory(index, temperature=temperature)
        candidates, _ = memory.read(case.queries, None)
        for lam in case.meta["lambdas"]:
            expected = case.arrays[f"hf_l2_T{temperature}_L{lam}"]
            mixed = merge_logits(Mixture(lam=lam), case.base, candidates)
            assert_close(mixed, expected, rtol=0, atol=ATOL)
            memory_partial, _ = memory.score(case.queries, case.targets, None)
            target = merge_target(Mixture(lam=lam), _partial(case), memory_partial)
            at_target = expected.gather(1, case.targets.unsqueeze(-1)).squeeze(-1)
            assert_close(target.target_lse - target.lse, at_target, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("name", "metric", "recompute"),
    [
        ("recompute_l2", "l2", True),
        ("do_not_recomp_l2", "l2", False),
        ("ip_faiss", "ip", False),
        ("dot_recompute", "ip", True),
    ],
)
@pytest.mark.parametrize("index", ["exact", "flat"])
def test_fairseq_target_scores(case, name, metric, recompute, index):
    memory = case.memory(index, metric, recompute=recompute)
    partial, _ = memory.score(case.queries, case.targets, None)
    case.check_rows(partial.target_lse - partial.lse, case.arrays[f"fs_{name}_target_knn_logprob"])
    for lam in case.meta["lambdas"]:
        mixed = merge_target(Mixture(lam=lam), _partial(case), partial)
        expected = case.arrays[f"fs_{name}_L{lam}"]
        assert_close(mixed.target_lse - mixed.lse, expected, rtol=0, atol=ATOL)


def test_dot_products_keep_their_sign(case):
    store = case.memory(metric="ip", recompute=True).store
    found = case.arrays["l2_ids"]
    keys = store.gather(found).float()
    plain = (keys * case.queries.unsqueeze(1)).sum(-1)
    assert_close(plain, case.arrays["dot_recomputed"], rtol=1e-5, atol=1e-4)
    for temperature in case.meta["temps"]:
        memory = case.memory(metric="ip", temperature=temperature)
        candidates, _ = memory.read(case.queries, None)
        rows = torch.log_softmax(token_log_scores(candidates, case.vocab), dim=-1)
        wrong = case.arrays[f"hf_dot_T{temperature}_knn_logprob"]
        said = (wrong > FLOOR / 2) & rows.isfinite()
        assert (rows - wrong)[said].abs().max() > 100 * ATOL


def test_the_supplied_index_answers_as_it_did(golden_retomaton_dstore_gpt2):
    folder = golden_retomaton_dstore_gpt2
    meta = json.loads((folder / "meta.json").read_text())
    expected = np.load(folder / "ivfpq_search.npz")
    index = FaissIndex.from_file(next(folder.glob("*.indexed")), nprobe=meta["probe"])
    assert (len(index), index.dim) == (meta["n"], meta["dim"])
    assert index.describe()["nprobe"] == meta["probe"]

    k = expected["ids"].shape[1]
    found = index.search(torch.from_numpy(expected["queries"]), k)
    assert_close(-found.scores, torch.from_numpy(expected["dist"]), rtol=1e-4, atol=ATOL)
    distances = torch.from_numpy(expected["dist"])
    untied = torch.ones_like(distances, dtype=torch.bool)
    gaps = distances.diff(dim=1) > ATOL
    untied[:, 1:] &= gaps
    untied[:, :-1] &= gaps
    assert untied.any()
    assert torch.equal(found.ids[untied], torch.from_numpy(expected["ids"])[untied])
    assert (
        torch.equal(found.ids.sort().values, torch.from_numpy(expected["ids"]).sort().values)
        or not untied[:, -1].all()
    )

    keys = index.reconstruct(torch.arange(10))
    assert_close(keys, torch.from_numpy(expected["reconstruct_0_9"]), rtol=1e-5, atol=1e-5)


def _trace_names(folder):
    summary = json.loads((folder / "summary.json").read_text())
    plain = [
        name
        for name, run in summary.items()
        if run.get("config", {}).get("kind") == "knn" or run.get("config", {}).get("no_pointer")
    ]
    return summary, plain


def test_plain_knn_runs_over_recorded_queries(golden_retomaton_eval_gpt2):
    """Every kNN-LM run of the trace: the mixture's log-prob of each label, without the model."""
    folder = golden_retomaton_eval_gpt2
    stored = sibling(folder, "dstore_gpt2")
    meta = json.loads((stored / "meta.json").read_text())
    keys = np.fromfile(next(stored.glob("*_keys.npy")), np.float16)
    keys = keys.reshape(meta["n"], meta["dim"])
    values = np.fromfile(next(stored.glob("*_vals.npy")), np.int32)
    store = MemoryStore(torch.from_numpy(keys), torch.from_numpy(values), shard=2000)
    files = [np.load(path) for path in sorted(folder.glob("*.npz"))]
    recorded = next(arrays for arrays in files if "queries" in arrays)
    queries = torch.from_numpy(recorded["queries"])
    labels = torch.from_numpy(recorded["label"]).long()
    base = torch.from_numpy(np.load(folder / "windows.npz")["base_logprob"])
    base = TargetPartial(lse=torch.zeros_like(base), target_lse=base)

    summary, names = _trace_names(folder)
    assert names
    for name in names:
        config, expected = summary[name]["config"], np.load(folder / f"{name}.npz")
        index = (
            ExactIndex(store)
            if config["index"] == "flat"
            else FaissIndex.from_file(next(stored.glob("*.indexed")), nprobe=config["probe"])
        )
        memory = KnnMemory(
            store,
            k=config["k"],
            temperature=config["knn_temp"],
            index=index,
            recompute=config.get("recompute_dists", False),
        )
        partial, _ = memory.score(queries, labels, None)
        mixed = merge_target(Mixture(lam=config["lmbda"]), base, partial)
        found = mixed.target_lse - mixed.lse
        assert_close(found, torch.from_numpy(expected["logprob"]), rtol=0, atol=ATOL)
        perplexity = float(torch.exp(-found.double().mean()))
        assert perplexity == pytest.approx(summary[name]["ppl_token"], rel=1e-5)
        if "knns" in expected and len(expected["knns"]) == len(queries) * config["k"]:
            candidates, _ = memory.read(queries, None)
            ids = torch.from_numpy(expected["knns"]).view(len(queries), config["k"])
            assert torch.equal(candidates.ids.sort().values, ids.sort().values)
            distances = torch.from_numpy(expected["neg_dist"]).view_as(ids)
            assert_close(
                candidates.scores, distances.sort(descending=True).values, rtol=1e-4, atol=ATOL
            )


def _partial(case):
    target = case.base.gather(1, case.targets.unsqueeze(-1)).squeeze(-1)
    return TargetPartial(lse=case.base.logsumexp(-1), target_lse=target)


def _places(ids, among):
    return (ids.unsqueeze(-1) == among.unsqueeze(1)).int().argmax(-1)
