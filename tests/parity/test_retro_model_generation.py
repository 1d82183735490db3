"""Filters, generation and training of RETRO models against retro-pytorch."""

import json

import torch
from retro_models import read_model, run, stated
from safetensors.torch import load_file

from memlm.importers.retro_checkpoint import target_name
from memlm.models.retro.sampling import generate_as_original, keep_nucleus, keep_top_fraction
from memlm.training.retro_groups import retro_groups


class Arithmetic:
    """The recorded retrieval: token (sum of the chunk + a j + b p) mod c + d at place p."""

    def __init__(self, k, length, a, b, modulus, first):
        self.grid = a * torch.arange(k)[:, None] + b * torch.arange(length)
        self.modulus, self.first = modulus, first

    def retrieve(self, chunks):
        sums = torch.stack([chunk.sum() for chunk in chunks])
        tokens = (sums[:, None, None] + self.grid) % self.modulus + self.first
        return tokens, torch.ones_like(tokens, dtype=torch.bool)


def test_sampling_filters(golden_retro_unit_sampling_filters):
    data = load_file(golden_retro_unit_sampling_filters / "data.safetensors")
    for name, expected in data.items():
        if name.startswith("top_"):
            kind, _, threshold = name.rpartition("_")
            keep = {"top_k": keep_top_fraction, "top_p": keep_nucleus}[kind]
            assert torch.equal(keep(data["logits"], float(threshold)), expected)


def test_generation(golden_retro_generate):
    folder = golden_retro_generate
    model, config = read_model(folder)
    data = load_file(folder / "data.safetensors")
    formula = r"\(\(sum\(t\) \+ (\d+)\*j \+ (\d+)\*p\) mod (\d+)\) \+ (\d+)"
    numbers = map(int, stated(folder, formula))
    retriever = Arithmetic(config["knn"], 2 * config["chunk_size"], *numbers)
    for name, case in json.loads((folder / "runs.json").read_text()).items():
        found = generate_as_original(
            model,
            data.get(f"{name}.start"),
            retriever=retriever,
            filtering=keep_nucleus if case.get("filter_fn") == "top_p" else keep_top_fraction,
            threshold=case["filter_thres"],
            temperature=case.get("temperature", 1.0),
            noise=data.get(f"{name}.uniform_noise"),
        )
        assert torch.equal(found, data[f"{name}.out"]), name


def test_training(golden_retro_optimizer_and_trajectory):
    folder = golden_retro_optimizer_and_trajectory
    model, _ = read_model(folder, "weights_initial.safetensors")
    gated = model.config.norm == "gated_rms"
    data = load_file(folder / "data.safetensors")
    recorded = json.loads((folder / "param_groups.json").read_text())
    groups = retro_groups(model, weight_decay=recorded[0]["weight_decay"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group, expected in zip(groups, recorded, strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        found = {names[id(parameter)] for parameter in group["params"]}
        assert found == {target_name(name, gated=gated) for name in expected["params"]}
    optimizer = torch.optim.AdamW(
        groups, lr=recorded[0]["lr"], betas=recorded[0]["betas"], eps=recorded[0]["eps"]
    )
    model.train()
    losses = []
    for seq, retrieved in zip(data["seq"], data["retrieved"], strict=True):
        loss = run(model, {"seq": seq, "retrieved": retrieved}, loss=True).loss
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(torch.stack(losses), data["losses"], atol=1e-4, rtol=0)
    state = model.state_dict()
    for name, expected in data.items():
        if name.startswith("final."):
            value = state[target_name(name.removeprefix("final."), gated=gated)]
            torch.testing.assert_close(value.view_as(expected), expected, atol=1e-3, rtol=0)
