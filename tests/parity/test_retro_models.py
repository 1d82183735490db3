"""RETRO models, their parts, initialisation and training against retro-pytorch."""

import json

import torch
from retro_models import read_model, run
from safetensors.torch import load_file

from memlm.importers.retro_checkpoint import target_name

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


def test_model(golden_retro_model):
    folder = golden_retro_model
    model, _ = read_model(folder)
    gated = model.config.norm == "gated_rms"
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        data = load_file(folder / f"{name}.safetensors")
        scored = "loss" in data
        model.train(scored)
        model.zero_grad()
        output = run(model, data, loss=scored)
        torch.testing.assert_close(output.logits, data["logits"], **TOLERANCE)
        if not scored:
            continue
        torch.testing.assert_close(output.loss, data["loss"].reshape(()), atol=1e-5, rtol=0)
        output.loss.backward()
        grads = {key: p.grad for key, p in model.named_parameters()}
        for key, expected in data.items():
            if not key.startswith("grad."):
                continue
            ours = grads[target_name(key.removeprefix("grad."), gated=gated)]
            torch.testing.assert_close(ours.reshape(expected.shape), expected, atol=1e-5, rtol=1e-4)
        found = torch.stack([g.norm() for g in grads.values() if g is not None]).norm()
        torch.testing.assert_close(found, data["grad_total_norm"].reshape(()), atol=1e-5, rtol=1e-4)
        none = {target_name(key, gated=gated) for key in case["params_with_grad_none"]}
        assert {key for key, grad in grads.items() if grad is None} == none


def test_loss_is_the_same_in_evaluation(golden_retro_model):
    data = load_file(golden_retro_model / "train_full.safetensors")
    model, _ = read_model(golden_retro_model)
    output = run(model.eval(), data, loss=True)
    torch.testing.assert_close(output.loss, data["loss"].reshape(()), atol=1e-5, rtol=0)
