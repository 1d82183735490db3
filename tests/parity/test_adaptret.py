"""The learnt gate against the original: weights, losses, gradients, cutoffs of AdaptRet's MLP."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from memlm.core.types import TargetPartial
from memlm.evaluation.gate_data import GateData, measure_gate
from memlm.models.retrieval_gate import GateConfig, RetrievalGate, threshold_at
from memlm.ops.merge import mixture
from memlm.training.retrieval_gate import gate_loss


@pytest.fixture
def case(golden_retomaton_adaptret_mlp):
    folder = golden_retomaton_adaptret_mlp
    arrays = np.load(folder / "arrays.npz")
    arrays = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    summary = json.loads((folder / "summary.json").read_text())
    gate = RetrievalGate(
        GateConfig(
            summary["feature_size"],
            hidden=summary["hidden_units"],
            layers=summary["nlayers"],
            dropout=0.0,
        )
    )
    gate.load_state_dict(load_file(folder / "model.safetensors"))
    features = {
        name.removeprefix("feat_"): part for name, part in arrays.items() if name[:5] == "feat_"
    }
    data = GateData(features, arrays["lm_logprob"], arrays["knn_logprob"])
    return gate.eval(), data, arrays, summary


def test_weights_losses_and_gradients(case):
    gate, data, arrays, summary = case
    log_weights = gate(data.features)
    torch.testing.assert_close(log_weights, arrays["log_weight"], atol=1e-5, rtol=0)
    loss, nll = gate_loss(log_weights, data.model, data.memory, l1=summary["l1"])
    torch.testing.assert_close(nll, arrays["ce"], atol=1e-5, rtol=0)
    assert float(loss.detach()) == pytest.approx(float(arrays["loss"]), abs=1e-5)
    loss.backward()
    parameters = dict(gate.named_parameters())
    names = [name.removeprefix("grad_") for name in arrays if name.startswith("grad_")]
    assert names
    for name in names:
        expected = arrays[f"grad_{name}"]
        torch.testing.assert_close(parameters[name].grad, expected, atol=1e-5, rtol=1e-4)


def test_perplexity_with_fewer_and_fewer_searches(case):
    gate, data, _, summary = case
    everywhere = measure_gate(gate, data)
    assert everywhere.perplexity == pytest.approx(summary["ppl_all"], rel=1e-5)
    assert everywhere.saved == 0
    cutoffs = [int(name.removeprefix("cutoff")) for name in summary if name.startswith("cutoff")]
    assert cutoffs
    constants = [name for name in summary if name.startswith("ppl_constant_lambda")]
    for name in constants:
        lam = float(name.removeprefix("ppl_constant_lambda"))
        whole = torch.zeros_like(data.model)
        mixed = mixture(lam, TargetPartial(whole, data.model), TargetPartial(whole, data.memory))
        nll = float((mixed.lse - mixed.target_lse).double().mean())
        assert np.exp(nll) == pytest.approx(summary[name], rel=1e-6)
    for percent in cutoffs:
        expected = summary[f"cutoff{percent}"]
        threshold = threshold_at(gate(data.features), percent / 100)
        assert threshold == pytest.approx(expected["threshold"], abs=1e-6)
        found = measure_gate(gate, data, threshold)
        assert found.perplexity == pytest.approx(expected["ppl"], rel=1e-5)
