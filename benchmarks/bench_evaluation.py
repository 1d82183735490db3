"""kNN-LM evaluation against the base model, and against the floor of the search.

One model, one text, stores of several sizes. For each: seconds of ``evaluate`` with and without
memory (A B A B ...), and what the search must at least cost on this machine, measured in the same
run:

    operations   2 N d per query at the speed of a large float32 matrix product
    bytes        N d 2 (float16 keys, read once per block of queries) at the speed of a memory read
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_extraction import model_of
from benchmarks.common import copy_bandwidth, matmul_flops, paired, save
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.index.build import build_index
from memlm.index.plan import IndexConfig
from memlm.memory.knn import KnnMemory
from memlm.models.fingerprint import model_hash
from memlm.store.arrays import save_arrays

HIDDEN, LAYERS, TOKENS, NEIGHBOURS = 256, 4, 4096, 1024


def manifold_keys(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Keys near a 24-dimensional surface: hidden states are far from filling their space."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(count, 24, generator=generator)
    keys = inner @ torch.randn(24, dim, generator=generator)
    return (torch.tanh(keys) + 0.05 * torch.randn(count, dim, generator=generator)).half()


def measure(entries: int, kind: str, threads: int, rounds: int, floors: dict) -> dict:
    model = model_of(HIDDEN, LAYERS)
    corpus = TokenCorpus.from_tokens(np.random.default_rng(0).integers(0, 4096, TOKENS + 1))
    windows = SlidingWindows(length=256, stride=256)
    keys = manifold_keys(entries, HIDDEN)
    values = torch.randint(0, 4096, (entries,))
    with tempfile.TemporaryDirectory() as folder:
        store = save_arrays(
            Path(folder) / "s", keys, values, model_hash=model_hash(model), tap="ffn_input"
        )
        index = "exact"
        recall = 1.0
        if kind == "ivfpq":
            lists = int(4 * entries**0.5)
            config = IndexConfig(type="ivfpq", lists=lists, train_size=64 * lists)
            index = build_index(store, config, threads=threads, quiet=True)
            recall = index.describe()["recall"]["value"]
        memory = KnnMemory(store, k=NEIGHBOURS, index=index)

        def with_memory():
            evaluate(model, corpus, windows, memory=memory, threads=threads, progress=False)

        def base():
            evaluate(model, corpus, windows, threads=threads, progress=False)

        timing = paired(with_memory, base, rounds=rounds)
    search = timing["first_seconds"] - timing["second_seconds"]
    operations = 2 * entries * HIDDEN * TOKENS / floors["matmul_flops"]
    blocks = -(-TOKENS // 4096)
    bytes_read = entries * HIDDEN * 2 * blocks / floors["read_bytes_per_second"]
    result = {
        "entries": entries,
        "index": kind,
        "recall": recall,
        "knn_over_base": timing["ratio"],
        "milliseconds_per_query": 1000 * search / TOKENS,
        **timing,
    }
    if kind == "exact":
        result["floor_seconds"] = operations + bytes_read
        result["search_over_floor"] = search / (operations + bytes_read)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 400_000])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    floors = {
        "matmul_flops": matmul_flops(options.threads),
        "read_bytes_per_second": copy_bandwidth(),
    }
    cases = [
        measure(entries, kind, options.threads, options.rounds, floors)
        for entries in options.entries
        for kind in ("exact", "ivfpq")
    ]
    save(
        "evaluation",
        {
            "model": f"llama, {HIDDEN} wide, {LAYERS} layers, vocabulary 4096",
            "tokens": TOKENS,
            "k": NEIGHBOURS,
            "floors": floors,
            "cases": cases,
        },
    )


if __name__ == "__main__":
    main()
