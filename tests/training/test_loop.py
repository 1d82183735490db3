"""The loop itself: models with their own loss, several processes, a process killed anywhere."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus
from memlm.testing.processes import run_processes
from memlm.testing.tiny import tiny_model
from memlm.training.blocks import HeldOutBlocks, collate, pack
from memlm.training.causal_lm import read_in_order
from memlm.training.config import RunConfig, TrainConfig
from memlm.training.loop import train
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


def run_method(method, processes, out, changes):
    """Train with memory; with several processes, one of them."""
    if processes > 1:
        os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(dist.get_rank())
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"] = str(processes)
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
        quiet=True,
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
