"""Objectives through whole models: every head, several processes, warm-up and drops."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.testing.processes import run_processes
from memlm.testing.tiny import tiny_model, tiny_tokens
from memlm.training.objectives import module as room
from memlm.training.objectives.config import METHODS, Objective
from memlm.training.objectives.module import ObjectiveModule

ROWS, TIME = 4, 7


def make_batch(repeats=True):
    tokens = tiny_tokens(ROWS, TIME + 1, vocab_size=12 if repeats else 61, seed=3)
    targets = tokens[:, 1:].clone()
    targets[2, 5:] = -100
    return {"input_ids": tokens[:, :-1].contiguous(), "shift_labels": targets}


def by_one_softmax(model, batch, sees):
    """TRIME's loss as its equation says: vocabulary and memory concatenated."""
    keys = []
    hook = model.model.layers[-1].mlp.register_forward_pre_hook(
        lambda _, args: keys.append(args[0])
    )
    logits = model(input_ids=batch["input_ids"]).logits.double()
    hook.remove()
    keys, targets = keys[0].double(), batch["shift_labels"]
    loss = 0
    for row in range(ROWS):
        for place in range(TIME):
            if (target := targets[row, place]) == -100:
                continue
            seen = [
                (other, there)
                for other in range(ROWS)
                for there in range(TIME)
                if targets[other, there] != -100 and sees((row, place), (other, there))
            ]
            scores = [keys[row, place] @ keys[key] / math.sqrt(keys.shape[-1]) for key in seen]
            every = torch.stack([*logits[row, place], *scores]).softmax(-1)
            right = torch.tensor(
                [v == target for v in range(61)] + [targets[k] == target for k in seen]
            )
            loss = loss - every[right].sum().log()
    return loss


SEES = {
    "trime": lambda query, key: key[0] == query[0] and key[1] < query[1],
    "trime_long": lambda query, key: key < query,
    "trime_ext": lambda query, key: key[0] != query[0] or key[1] < query[1],
}


@pytest.mark.parametrize("method", SEES)
def test_is_one_softmax_over_vocabulary_and_memory(method):
    model, batch = tiny_model("llama").double(), make_batch()
    output = ObjectiveModule(model, Objective(method=method, drop_own=0.0))(batch)
    expected = by_one_softmax(model, batch, SEES[method])
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-12, atol=0)
    assert int(output.count) == ROWS * TIME - 2
    ours = torch.autograd.grad(output.loss_sum, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gptj", "mpt", "opt", "granite"])
def test_every_head_gives_cross_entropy_and_a_lower_bound_for_copies(family, monkeypatch):
    monkeypatch.setattr(room, "_ROWS", 5)
    model, batch = tiny_model(family), make_batch()
    logits = model(input_ids=batch["input_ids"]).logits
    expected = cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum")
    plain = ObjectiveModule(model, Objective())(batch)
    torch.testing.assert_close(plain.loss_sum, expected, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad(plain.loss_sum, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for our, their in zip(ours, theirs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)
    trime = ObjectiveModule(model, Objective(method="trime"))(batch)
    torch.testing.assert_close(trime.figures["model"], expected.detach(), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(trime.loss_sum, expected)


def test_the_two_ways_to_a_plain_head_agree(monkeypatch):
    model, batch = tiny_model("llama").double(), make_batch()
    results = []
    for plain in (True, False):
        monkeypatch.setattr(room, "_is_plain", lambda head, plain=plain: plain)
        output = ObjectiveModule(model, Objective(method="trime_long"))(batch)
        results.append([output.loss_sum, output.figures["model"]])
        results[-1] += torch.autograd.grad(output.loss_sum, list(model.parameters()))
    for fused, generic in zip(*results, strict=True):
        torch.testing.assert_close(fused, generic, rtol=1e-10, atol=1e-12)


def test_warm_up_is_cross_entropy_and_only_in_training():
    batch, model = make_batch(), tiny_model("llama")
    module = ObjectiveModule(model, Objective(method="trime", warmup_steps=2)).train()
    warm, later = module(batch, step=1).loss_sum, module(batch, step=2).loss_sum
    assert torch.equal(warm.detach(), module(batch, step=1).figures["model"])
    assert not torch.isclose(warm, later)
    assert torch.equal(module.eval()(batch, step=0).loss_sum, later)


def test_the_own_row_is_dropped_with_the_given_probability_and_seed():
    batch, model = make_batch(), tiny_model("llama")
    always = ObjectiveModule(model, Objective(method="trime_ext", drop_own=1.0)).train()
    never = ObjectiveModule(model, Objective(method="trime_ext", drop_own=0.0)).train()
    dropped, kept = (always(batch).loss_sum.item(), never(batch).loss_sum.item())
    assert abs(dropped - kept) > 0.1
    assert always.eval()(batch).loss_sum.item() == kept
    half = ObjectiveModule(model, Objective(method="trime_ext", drop_own=0.5)).train()
    draws = [half(batch, step=step).loss_sum.item() == dropped for step in range(24)]
    assert draws == [half(batch, step=step).loss_sum.item() == dropped for step in range(24)]
    assert 4 < sum(draws) < 20
    assert draws != [half(batch, step=s, micro=1).loss_sum.item() == dropped for s in range(24)]


def test_no_memory_is_cross_entropy_in_value_and_gradient():
    """One row of one target sees nothing."""
    model, batch = tiny_model("llama"), make_batch()
    batch = {name: column[:1, :1] for name, column in batch.items()}
    found = []
    for method in METHODS:
        loss = ObjectiveModule(model, Objective(method=method))(batch).loss_sum
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for values in zip(*found, strict=True):
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_gives_the_same_gradients_or_is_refused():
    batch, found = make_batch(), []
    for reentrant in (None, False, True):
        model = tiny_model("llama").train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        module = ObjectiveModule(model, Objective(method="trime"))
        if reentrant:
            with pytest.raises(UnsupportedModelError, match="'use_reentrant': False"):
                module(batch)
            continue
        module(batch).loss_sum.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for without, with_checkpoints in zip(*found, strict=True):
        torch.testing.assert_close(with_checkpoints, without)


# -- several processes ---------------------------------------------------------------------------


def step_of_a_process(objective, batch):
    """One step under DDP, which averages: hence the factor."""
    rank, size = dist.get_rank(), dist.get_world_size()
    module = ObjectiveModule(tiny_model("llama").double(), objective)
    wrapped = torch.nn.parallel.DistributedDataParallel(module)
    output = wrapped({name: column[rank : rank + 1] for name, column in batch.items()})
    (output.loss_sum * size).backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return output.loss_sum.detach(), grads


@pytest.mark.parametrize("method", METHODS)
def test_processes_of_one_row_are_one_process_of_many_rows(method):
    batch = make_batch()
    objective = Objective(method=method, drop_own=0.0, ranks_per_stream=ROWS)
    alone = Objective(method=method, drop_own=0.0)
    module = ObjectiveModule(tiny_model("llama").double(), alone)
    expected = module(batch).loss_sum
    expected.backward()
    answers = run_processes(step_of_a_process, ROWS, objective, batch)
    torch.testing.assert_close(sum(loss for loss, _ in answers), expected.detach())
    for _, grads in answers:
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-11)


def refused(objective, batch):
    with pytest.raises(InputError, match="multiple of ranks_per_stream, got 2 processes and"):
        ObjectiveModule(tiny_model("llama"), objective)(batch)
    return True


def test_streams_must_be_whole():
    objective = Objective(method="trime_long", ranks_per_stream=3)
    assert run_processes(refused, 2, objective, make_batch()) == [True, True]


# -- bad input -----------------------------------------------------------------------------------


def test_bad_batches():
    module, batch = ObjectiveModule(tiny_model("llama"), Objective()), make_batch()
    with pytest.raises(InputError, match=r"\['shift_labels'\] are missing"):
        module({"input_ids": batch["input_ids"]})
    with pytest.raises(InputError, match=r"stream must be \(rows, time\) like input_ids \(4, 7\)"):
        module({**batch, "stream": torch.zeros(4, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "trim"}, "method must be one of ce, trime, trime_long, trime_ext, got trim"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"drop_own": 1.5}, "drop_own is a probability and must lie between 0 and 1, got 1.5"),
        ({"ranks_per_stream": 0}, "ranks_per_stream must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        Objective(**settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_module_gives_the_same(method):
    """The body is one graph; hooks and the tiles of the memory run between graphs."""
    batch, model = make_batch(), tiny_model("llama")
    module = ObjectiveModule(model, Objective(method=method, drop_own=0.0))
    expected = module(batch).loss_sum
    found = torch.compile(module, backend="aot_eager")(batch).loss_sum
    torch.testing.assert_close(found, expected)
    ours, theirs = (
        torch.autograd.grad(loss, list(model.parameters())) for loss in (found, expected)
    )
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)
