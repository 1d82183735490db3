"""Two real processes give the result of one, to the last bit."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.length import LengthConfig, measure_lengths
from memlm.evaluation.perplexity import evaluate
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.store.arrays import save_arrays
from memlm.testing.processes import run_processes
from memlm.testing.tiny import tiny_model, tiny_tokens

LENGTHS = LengthConfig(
    lengths=(40, 70), window=40, sinks=3, methods=("vanilla", "truncation", "lm-infinite"),
    pieces=5, scored=10, batch_tokens=80,
)  # fmt: skip


def results(folder):
    """Perplexities without and with memories of every kind, and a curve."""
    model = tiny_model("llama")
    rows = [tiny_tokens(1, length, seed=length)[0].numpy() for length in (50, 9, 33, 70, 20)]
    offsets = np.cumsum([0, *map(len, rows)])
    corpus = TokenCorpus.from_tokens(np.concatenate(rows), offsets)
    generator = torch.Generator().manual_seed(0)
    if not (folder / "manifest.json").exists():
        save_arrays(folder, torch.randn(200, 16, generator=generator), tiny_tokens(1, 200)[0])
    from memlm.store.reader import Datastore

    store = Datastore.open(folder)
    settings = {"batch_tokens": 64, "tap": "ffn_input", "progress": False, "keep_tokens": True}
    found = [
        evaluate(
            model,
            corpus,
            SlidingWindows(length=16, stride=8),
            memory=memory,
            carry=carry,
            walk_rows=2,
            **settings,
        )
        for memory, carry in (
            (None, "document"),
            (KnnMemory(store, k=4), "document"),
            (AutomatonMemory(store, k=4), "document"),
            (AutomatonMemory(store, k=4), "window"),
            (LocalMemory(), "window"),
        )
    ]
    curve = measure_lengths(model, np.concatenate(rows), LENGTHS, progress=False)
    return found, curve


def comparable(outcome):
    found, curve = outcome
    values = []
    for result in found:
        value = result.to_dict()
        value["protocol"].pop("processes", None)
        del value["seconds"], value["summary"]
        values.append((value, result.token_log_probabilities.tolist()))
    return values, [replace(point, seconds=0.0) for point in curve.points]


def test_two_processes_are_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = results(tmp_path)
    finally:
        torch.set_num_threads(threads)
    together = run_processes(results, 2, tmp_path)
    assert [len(found) for found, _ in together] == [5, 5]
    assert together[0][0][0].protocol["processes"] == 2
    for outcome in together:
        assert comparable(outcome) == comparable(alone)


@pytest.mark.slow
def test_torchrun_writes_once(tmp_path, tokenizer):
    tiny_model("llama", max_position_embeddings=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog\n" * 30)
    command = ["-m", "memlm", "evaluate", "model", "text.txt", "--json", "--threads", "1"]
    more = ["--length", "16", "--batch-tokens", "64"]
    shown = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]):
        done = subprocess.run(
            [sys.executable, *launcher, *command, *more, "--save", f"{len(launcher)}.json"],
            cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        shown.append(json.loads(done.stdout)["base"])
    assert shown[0]["perplexity"] == shown[1]["perplexity"]
    kept = [json.loads((tmp_path / name).read_text())["base"] for name in ("0.json", "5.json")]
    assert kept[0]["documents"] == kept[1]["documents"]
