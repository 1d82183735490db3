"""Losses and gradients of TRIME's criteria, in one process and in several real ones."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from trime_models import PAD, OriginalHead, load_model, load_named, read_args

from memlm.testing.processes import run_processes
from memlm.training.objectives.config import Objective
from memlm.training.objectives.module import ObjectiveModule

# the original writes the loss of these variants as a plain sum of cross-entropies
WARM, FIXED = "ce_warmup", "fixed_tail_ignore"


def objective_of(args, variant):
    """Our settings for the options of a recorded run."""
    name = args["criterion"].removesuffix("_same_device").removesuffix("_loss")
    return Objective(
        method=name,
        drop_own=1.0 if variant == "cross_sent_only" else 0.0,
        warmup_steps=1 if variant == WARM else 0,
        ranks_per_stream=args["num_comb_shards"] if name == "trime_long" else 1,
        detach_remote=True,
    )


def run(folder, variant, recorded, args):
    """The loss and the gradients of one process."""
    model, names = load_named(folder)
    module = ObjectiveModule(model, objective_of(args, variant))
    module.training = True  # the criterion; the model stays in evaluation mode
    if variant != FIXED:
        module._head = OriginalHead(module._head)
    targets, fill = recorded["target"], recorded["target"] == PAD
    if variant == FIXED:
        targets = targets.masked_fill(fill, -100)
    found, states = {}, module._states

    def keep(input_ids):
        hidden, keys = states(input_ids)
        if fill.any():  # what a body makes of padding is its own; the criterion reads that too
            hidden, keys = (
                recorded[name].clone().requires_grad_() for name in ("features", "last_ffn_input")
            )
        # recorded is the gradient of the keys as keys; they also enter the last feed-forward
        found["features"], found["last_ffn_input"] = hidden, keys.clone()
        for part in found.values():
            part.retain_grad()
        return hidden, found["last_ffn_input"]

    module._states = keep
    output = module({"input_ids": recorded["src_tokens"], "shift_labels": targets})
    output.loss_sum.backward()
    parameters = dict(model.named_parameters())
    grads = {name: parameters[own].grad for name, own in names.items()}
    return {
        "loss": output.loss_sum.detach(),
        "model": output.figures["model"],
        **{name: states.detach() for name, states in found.items()},
        **{
            f"grad_{name}": torch.zeros_like(states) if states.grad is None else states.grad
            for name, states in found.items()
        },
        **{f"grad.{name}": grad for name, grad in grads.items()},
    }


def compare(found, recorded, log):
    torch.testing.assert_close(found["loss"], recorded["loss"][0], rtol=1e-5, atol=0)
    assert float(found["model"]) == pytest.approx(log["ori_loss"], rel=1e-5)
    real = recorded["target"] != PAD
    for name in ("features", "last_ffn_input"):
        torch.testing.assert_close(found[name][real], recorded[name][real], rtol=0, atol=1e-5)
        ours, theirs = found[f"grad_{name}"], recorded[f"grad_{name}"]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    checked = 0
    for name, grad in recorded.items():
        # with padding, gradients of the body were not made; the head's class scores are its own
        if name.startswith("grad.decoder.") and (real.all() or "class_proj" in name):
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=2e-5)
            checked += 1
    assert checked > 0


def check(folder):
    args, logs = read_args(folder), json.loads((folder / "logs.json").read_text())
    variants = sorted(
        {path.name.split(".")[0] for path in folder.glob("*.safetensors")} - {"model"}
    )
    assert variants
    for variant in variants:
        if files := sorted(folder.glob(f"{variant}.rank*.safetensors"), key=rank_of):
            together = run_processes(run_rank, len(files), folder, variant, files, args)
            for file, found in zip(files, together, strict=True):
                compare(found, load_file(file), logs[f"{variant}.rank{rank_of(file)}"])
        else:
            recorded = load_file(folder / f"{variant}.safetensors")
            compare(run(folder, variant, recorded, args), recorded, logs[variant])


def rank_of(path):
    return int(path.name.split("rank")[1].split(".")[0])


def run_rank(folder, variant, files, args):
    return run(folder, variant, load_file(files[dist.get_rank()]), args)


def test_local(golden_trime_trime_loss):
    check(golden_trime_trime_loss)


def test_long(golden_trime_trime_long_loss):
    check(golden_trime_trime_long_loss)


def test_long_on_one_device(golden_trime_trime_long_loss_same_device):
    check(golden_trime_trime_long_loss_same_device)


def test_external(golden_trime_trime_ext_loss):
    check(golden_trime_trime_ext_loss)


def test_padding_is_left_out(golden_trime_trime_loss):
    """What the recorded loss has too much with padding is that of the rows of padding."""
    folder = golden_trime_trime_loss
    args, recorded = read_args(folder), load_file(folder / "default.safetensors")
    padded = recorded["target"] == PAD
    model = load_model(folder)
    targets = recorded["target"].masked_fill(padded, -100)
    module = ObjectiveModule(model, objective_of(args, "default"))
    module._head = OriginalHead(module._head)
    whole = module({"input_ids": recorded["src_tokens"], "shift_labels": targets})
    apart = 0.0
    for row in range(len(targets)):
        real = ~padded[row]
        inputs = recorded["src_tokens"][row : row + 1, real]
        apart += module(
            {"input_ids": inputs, "shift_labels": recorded["target"][row : row + 1, real]}
        ).loss_sum
    torch.testing.assert_close(whole.loss_sum, apart, rtol=1e-5, atol=0)
    assert int(whole.count) == int((~padded).sum())
