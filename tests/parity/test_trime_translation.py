"""TRIME for translation: losses with gradients, and one step of decoding."""

import json

import torch
from safetensors.torch import load_file

from memlm.core.types import Candidates
from memlm.ops.merge import union_logits
from memlm.training.loss import head_memory_loss
from memlm.training.objectives.memory import Positions
from memlm.training.objectives.translation import translation_memory


def test_losses(golden_trime_mt_loss):
    folder = golden_trime_mt_loss
    settings = json.loads((folder / "config.json").read_text())
    recorded = load_file(folder / "io.safetensors")
    targets = recorded["target"].masked_fill(recorded["target"] == settings.get("pad", 1), -100)
    for kind in ("trime", "ce"):
        hidden, table = (recorded[name].requires_grad_() for name in ("hidden", "out_embed"))
        memory = None
        if kind == "trime":
            memory = translation_memory(
                Positions(hidden, targets),
                metric=settings["dist_func"],
                temperature=settings["temp"],
                k=settings["topk_mem"],
            )
            memory = type(memory)(*(part.flatten() for part in memory))
        loss, _ = head_memory_loss(hidden.flatten(0, 1), table, targets.flatten(), memory)
        torch.testing.assert_close(loss, recorded[f"{kind}.loss"][0], rtol=1e-4, atol=0)
        grads = torch.autograd.grad(loss, (hidden, table))
        for name, grad in zip(("grad_hidden", "grad_out_embed"), grads, strict=True):
            torch.testing.assert_close(grad, recorded[f"{kind}.{name}"], rtol=1e-5, atol=1e-5)


def test_a_step_of_decoding_is_a_union(golden_trime_mt_decode_mixture):
    folder = golden_trime_mt_decode_mixture
    settings = json.loads((folder / "config.json").read_text())
    recorded = load_file(folder / "io.safetensors")
    temperature = next(settings[name] for name in ("temp", "temperature") if name in settings)
    dim = next(settings[name] for name in ("dim", "key_dim", "dimension") if name in settings)
    logits, tokens = recorded["logits"].flatten(0, 1), recorded["tgt_index"].flatten(0, 1)
    scores = recorded["dists"].flatten(0, 1) / (temperature * dim**0.5)
    said = Candidates(scores, tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    found = union_logits(logits, said).log_softmax(-1)
    expected = recorded["normalised_log_prob"].flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    lam = recorded["lambda"].flatten(0, 1)
    weight = torch.sigmoid(scores.logsumexp(-1) - logits.logsumexp(-1))
    torch.testing.assert_close(weight[:, None], lam, rtol=0, atol=1e-5)
    # the released decoder: the memory's distribution with weight 1 instead of lam
    p_memory = recorded["knn_prob"].flatten(0, 1)
    released = torch.log(logits.softmax(-1) * (1 - lam) + p_memory)
    torch.testing.assert_close(
        released, recorded["released_log_prob"].flatten(0, 1), rtol=0, atol=1e-5
    )
