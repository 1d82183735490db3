"""The loop itself: models with their own loss, several processes, a process killed anywhere."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback

from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.testing.processes import run_processes
from memlm.testing.tiny import tiny_model
from memlm.training.blocks import HeldOutBlocks, collate, pack
from memlm.training.causal_lm import read_in_order
from memlm.training.config import RunConfig, TrainConfig
from memlm.training.folder import last_checkpoint
from memlm.training.loop import Loop, train
from memlm.training.model_loss import ModelLoss
from memlm.training.objectives.module import ObjectiveModule
from memlm.training.order import Dealt

LENGTH = 8


def settings(**changes):
    return {
        "block_length": LENGTH,
        "batch_tokens": 2 * LENGTH,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_steps": 5,
        "log_every": 1,
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
        **changes,
    }


def text(tokens=16 * LENGTH + 1):
    return pack(TokenCorpus.from_tokens(np.random.default_rng(1).integers(3, 40, tokens)))


class OwnLabels:
    """Blocks for a model that moves labels by itself."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, number):
        tokens = self.blocks[number]["input_ids"]
        labels = tokens.clone()
        labels[0] = -100
        return {"input_ids": tokens, "labels": labels}


def own_loss(out, **changes):
    examples = OwnLabels(HeldOutBlocks(text(), LENGTH))
    config = RunConfig(**settings(**changes))
    planned = [range(first, first + config.rows) for first in range(0, 16, config.rows)]
    module = ModelLoss(tiny_model("gpt2"))
    order = Dealt(planned, by="shuffled")
    return train(
        module,
        examples,
        order,
        config,
        out,
        collate=collate,
        identity={"data": "random"},
        held_out=examples,
        quiet=True,
    )


def test_a_model_with_its_own_loss_is_trained(tmp_path):
    model = own_loss(tmp_path, max_steps=30)
    summary = json.loads((tmp_path / "training.json").read_text())
    assert summary["curve"][-1]["loss"] < summary["curve"][0]["loss"] - 0.3
    assert summary["tokens"] == 30 * 2 * (LENGTH - 1)
    batch = collate([OwnLabels(HeldOutBlocks(text(), LENGTH))[n] for n in range(16)])
    with torch.no_grad():
        assert summary["held_out"]["loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def test_settings_that_do_not_fit_the_machine_are_refused(tmp_path):
    with pytest.raises(InputError, match="between several processes, but there is one"):
        own_loss(tmp_path / "a", sharded=True)
    with pytest.raises(InputError, match="needs a CUDA device"):
        own_loss(tmp_path / "b", precision="float16")


def run_method(method, processes, out, changes, *callbacks):
    """Train with memory, or go on; with several processes, one of them."""
    rows = 4 // processes
    changes = {"batch_tokens": rows * LENGTH, "ranks_per_stream": processes, **changes}
    config = TrainConfig(**settings(method=method, **changes))
    examples, order = read_in_order(text(), config, processes)
    held_out = HeldOutBlocks(text(5 * LENGTH), LENGTH)
    model = train(
        ObjectiveModule(tiny_model("llama"), config.objective()),
        examples,
        order,
        config,
        out,
        collate=collate,
        identity={},
        held_out=held_out,
        resume=True,
        quiet=True,
        callbacks=callbacks,
    )
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("method", ["ce", "trime_long", "trime_ext"])
def test_two_processes_are_one_with_twice_the_rows(method, tmp_path):
    changes = {"drop_own": 0.5, "optimizer": "nag", "clip_norm": 0.5, "accumulate": 2}
    alone = run_method(method, 1, tmp_path / "one", changes)
    for together in run_processes(run_method, 2, method, 2, tmp_path / "two", changes):
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    one, two = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two"))
    assert two["processes"] == 2
    assert one["tokens"] == two["tokens"]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    if method == "ce":  # with memory, other rows of the batch are seen or not
        assert one["held_out"] == pytest.approx(two["held_out"], rel=1e-4)


def sharded_step(method, shard):
    """Loss and gradients of one step, weights whole or shared between the processes."""
    config = TrainConfig(**settings(method=method, batch_tokens=4 * LENGTH))
    module = ObjectiveModule(tiny_model("llama"), config.objective())
    if shard:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    examples = HeldOutBlocks(text(), LENGTH)
    first = 4 * dist.get_rank()
    output = module(collate([examples[n] for n in range(first, first + 4)]))
    output.loss_sum.backward()
    grads = [weight.grad for weight in module.parameters()]
    if shard:
        return output.loss_sum.detach(), [grad.full_tensor() for grad in grads]
    for grad in grads:
        dist.all_reduce(grad)
    return output.loss_sum.detach(), [grad / dist.get_world_size() for grad in grads]


@pytest.mark.parametrize("method", ["ce", "trime_long"])
def test_shared_weights_give_the_same_step(method):
    whole = run_processes(sharded_step, 2, method, False)
    shared = run_processes(sharded_step, 2, method, True)
    for (loss, grads), (expected, whole_grads) in zip(shared, whole, strict=True):
        torch.testing.assert_close(loss, expected)
        for a, b in zip(grads, whole_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def on_processors(out):
    """Train with shared weights where there are no accelerators."""
    with pytest.raises(InputError, match="run on the cpu, where accelerate exchanges gradients"):
        run_method("ce", 2, out, {"sharded": True})


def test_processors_do_not_share_weights(tmp_path):
    run_processes(on_processors, 2, tmp_path)


class StopAt(TrainerCallback):
    """A crash after a given step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run_shared(out, stop):
    """A run with shared weights until it is stopped after a step; without a step, to the end.

    accelerate shares weights between accelerators only; here it takes two processors for some.
    """
    begin = AcceleratorState.__init__

    def as_accelerators(self, *args, **kwargs):
        if PartialState._shared_state and not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *args, **kwargs)

    AcceleratorState.__init__ = as_accelerators
    shared = []

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            shared.extend(isinstance(part, DTensor) for part in kwargs["model"].parameters())

    changes = {"accumulate": 2, "save_every": 2, "sharded": True}
    if stop is None:
        run_method("trime_long", 2, out, changes, Look())
    else:
        with pytest.raises(KeyboardInterrupt):
            run_method("trime_long", 2, out, changes, StopAt(stop))
    return shared


@pytest.mark.slow
def test_a_run_with_shared_weights_is_one_with_whole_weights(tmp_path):
    """Checkpoints, resuming and the model at the end included."""
    alone = run_method("trime_long", 1, tmp_path / "one", {"accumulate": 2, "save_every": 2})
    run_processes(run_shared, 2, tmp_path / "two", 3)
    assert last_checkpoint(tmp_path / "two" / "checkpoints")
    for shared in run_processes(run_shared, 2, tmp_path / "two", None):
        assert shared
        assert all(shared)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    for a, b in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-6)
    one, two = (json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two"))
    assert one["parameters"] == two["parameters"]
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


class Killing(TrainerCallback):
    """The end of the process, where no handler runs: before a step, or inside a checkpoint."""

    def __init__(self, step, inside):
        self.step, self.inside = step, inside

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.inside and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_log(self, args, state, control, **kwargs):
        # a point of the curve comes just before the checkpoint of its step
        if self.inside and state.global_step == self.step:
            Loop._save_rng_state = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore


def run_killed(out, step, inside):
    """Train until killed; without a step, to the end."""
    config = TrainConfig(**settings(method="trime", max_steps=9, save_every=2, log_every=3))
    examples, order = read_in_order(text(), config, 1)
    train(
        ObjectiveModule(tiny_model("llama"), config.objective()),
        examples,
        order,
        config,
        out,
        collate=collate,
        identity={},
        resume=True,
        quiet=True,
        callbacks=[] if step is None else [Killing(step, inside)],
    )


@pytest.mark.parametrize(("step", "inside"), [(5, False), (6, True)])
def test_a_killed_run_continues_identically(step, inside, tmp_path):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_killed, args=(tmp_path / "killed", step, inside))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "training.json").exists()
    checkpoints = tmp_path / "killed" / "checkpoints"
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-4"
    assert (checkpoints / "checkpoint-6").exists() == inside
    run_killed(tmp_path / "killed", None, False)
    run_killed(tmp_path / "whole", None, False)
    first, second = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed")
    )
    assert first["curve"] == second["curve"]
    assert [point["step"] for point in first["curve"]] == [2, 3, 4, 6, 8, 9]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "killed")]
    assert all(map(torch.equal, *(model.parameters() for model in models)))


CHILD = """
import sys
from pathlib import Path
from memlm.data.documents import Document
from memlm.data.tokens import tokenize
from memlm.training.causal_lm import train_causal_lm
from memlm.training.config import TrainConfig
from memlm.training.tokenizer import train_tokenizer

documents = [Document(str(n), f"Number {n} is {n * n} and no other. " * 9) for n in range(30)]
tokenizer = train_tokenizer(documents, 280)
config = TrainConfig(
    hidden_size=16, layers=2, heads=2, intermediate_size=32, block_length=16, batch_tokens=64,
    method="trime", memory_after=5, max_steps=120, save_every=4, log_every=2, evaluate_every=10,
    precision="float32", device="cpu", threads=1, keep_steps=(30,), keep_best=True,
)
corpus = tokenize(documents, tokenizer)
train_causal_lm(corpus, tokenizer, config, sys.argv[1], held_out=corpus, resume=True, quiet=True)
"""


def child(out):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(out)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def outcome(out):
    summary = json.loads((out / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    kept = AutoModelForCausalLM.from_pretrained(out / "step-30")
    best = json.loads((out / "best" / "evaluation.json").read_text())
    weights = [*model.parameters(), *kept.parameters()]
    return summary["curve"], summary["evaluations"], summary["held_out"], best, weights


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_anywhere_ends_as_if_nothing_had_happened(seed, tmp_path):
    assert child(tmp_path / "whole").wait() == 0
    draw = np.random.default_rng(seed)
    kills = 0
    for _ in range(30):
        process = child(tmp_path / "killed")
        # begin the clock when the folder is there: before that nothing can be lost
        while process.poll() is None and not (tmp_path / "killed" / "run.json").exists():
            time.sleep(0.05)
        try:
            process.wait(timeout=float(draw.uniform(0.0, 1.5)) if kills < 6 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        if process.wait() == 0:
            break
    assert kills >= 1
    *figures, weights = outcome(tmp_path / "killed")
    *expected, expected_weights = outcome(tmp_path / "whole")
    assert figures == expected
    assert all(map(torch.equal, weights, expected_weights))
