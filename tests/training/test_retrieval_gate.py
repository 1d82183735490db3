"""The learnt gate: it learns when a memory helps, and which searches can be left out."""

import numpy as np
import pytest
import torch

from memlm.core.errors import InputError
from memlm.core.types import TargetPartial
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.gate_data import GateData, count_contexts, gather_gate_data, measure_gate
from memlm.evaluation.perplexity import evaluate
from memlm.extract.build import build_datastore
from memlm.memory.knn import KnnMemory
from memlm.models.retrieval_gate import GateConfig, RetrievalGate, threshold_at
from memlm.ops.merge import mixture
from memlm.testing.tiny import tiny_model, tiny_tokens
from memlm.training.retrieval_gate import GateTraining, train_gate

SMALL = GateTraining(epochs=30, learning_rate=1e-2)


def helpful(count=400, seed=0):
    """A memory that is right where the second feature is positive, and wrong elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    features = {"ctxt": torch.randn(count, 4, generator=generator),
                "lm_ent": torch.randn(count, 1, generator=generator)}  # fmt: skip
    right = features["lm_ent"][:, 0] > 0
    memory = torch.where(right, -0.1, -8.0)
    return GateData(features, torch.full((count,), -2.0), memory), right


def test_it_learns_where_to_ask():
    (data, _), (test, right) = helpful(), helpful(seed=1)
    gate = train_gate(data, GateConfig({"ctxt": 4, "lm_ent": 1}, hidden=16, layers=2), SMALL)
    lam = gate.weigh(test.features).detach()
    assert float(lam[right].mean()) > 0.8
    assert float(lam[~right].mean()) < 0.2
    everywhere = measure_gate(gate, test)
    half_and_half = test.nll(torch.full((len(test), 2), 0.5).log()).mean().exp()
    assert everywhere.perplexity < 0.8 * float(half_and_half)
    threshold = threshold_at(gate(data.features), 0.5)
    half = measure_gate(gate, test, threshold)
    assert half.saved == pytest.approx(0.5, abs=0.1)
    assert half.perplexity == pytest.approx(everywhere.perplexity, rel=0.1)
    again = train_gate(data, GateConfig({"ctxt": 4, "lm_ent": 1}, hidden=16, layers=2), SMALL)
    assert torch.equal(again.weigh(test.features).detach(), lam)


def test_its_weights_are_those_of_the_mixture():
    data, _ = helpful(20)
    gate = RetrievalGate(GateConfig({"ctxt": 4, "lm_ent": 1}, hidden=8, layers=1)).eval()
    log_weights = gate(data.features).detach()
    threshold = threshold_at(log_weights, 0.3)
    lam = gate.weigh(data.features, threshold).detach()
    assert int((lam == 0).sum()) == 6
    zero = torch.zeros(20)
    mixed = mixture(lam, TargetPartial(zero, data.model), TargetPartial(zero, data.memory))
    expected = data.nll(log_weights, threshold)
    torch.testing.assert_close(mixed.lse - mixed.target_lse, expected)


def test_contexts_are_counted_inside_documents():
    corpus = TokenCorpus.from_tokens([5, 6, 5, 6, 7, 5, 6], [0, 5, 7])
    counts = count_contexts(corpus, 2)
    assert counts.count[(5,)] == 3
    assert counts.successors[(5,)] == 1
    assert counts.count[(6,)] == 2
    assert counts.successors[(6,)] == 2
    assert counts.count[(5, 6)] == 2
    assert (7, 5) not in counts.count


def test_data_of_a_model_and_its_store(tmp_path):
    model, windows = tiny_model("llama"), SlidingWindows(length=16, stride=8)
    corpus = TokenCorpus.from_tokens(tiny_tokens(1, 80)[0].numpy(), [0, 30, 80])
    store = build_datastore(model, None, corpus, tmp_path / "store", windows=windows)
    memory = KnnMemory(store, k=4, temperature=2.0)
    text = TokenCorpus.from_tokens(tiny_tokens(1, 50, seed=1)[0].numpy(), [0, 20, 50])
    data = gather_gate_data(model, text, windows, memory, counts=count_contexts(corpus, 3))
    assert len(data) == 48
    assert {name: part.shape[1] for name, part in data.features.items()} == {
        "ctxt": 16, "lm_ent": 1, "lm_max": 1, "freq": 3, "fert": 3
    }  # fmt: skip
    base = evaluate(model, text, windows, keep_tokens=True, progress=False)
    torch.testing.assert_close(
        data.model.double(), torch.from_numpy(base.token_log_probabilities), atol=1e-5, rtol=0
    )
    before = np.concatenate([corpus.tokens[:29], corpus.tokens[30:79]])  # what has a successor
    count = float((before == text.tokens[0]).sum())
    assert float(data.features["freq"][0, 0]) == pytest.approx(np.log1p(count))
    gate = train_gate(data, training=GateTraining(epochs=1))
    assert 0 < measure_gate(gate, data).perplexity < 1e6


def test_wrong_settings_are_refused():
    gate = RetrievalGate(GateConfig({"ctxt": 4}, hidden=8, layers=1))
    with pytest.raises(InputError, match=r"'ctxt' must be \(queries, 4\), got none"):
        gate({})
    with pytest.raises(InputError, match="at least one feature"):
        GateConfig({})
    with pytest.raises(InputError, match="need a query of at least as many columns"):
        RetrievalGate(GateConfig({"ctxt": 1, "a": 1, "b": 1}))
    with pytest.raises(InputError, match="a share must lie"):
        threshold_at(torch.zeros(3, 2), 1.5)
    assert threshold_at(torch.zeros(3, 2), 0.0) == float("inf")
    with pytest.raises(InputError, match="at least 2 tokens"):
        train_gate(helpful(1)[0])
