"""What TRIME costs: a training step against plain cross-entropy, an evaluation, and BM25 grouping.

Training: one Llama, one batch of n positions, every position remembers all n / 2 earlier ones on
average (``trime_long`` on one device). Seconds of a step with its backward pass (CE and TRIME in
turn), what the memory must at least cost at the speed of a large matrix product measured in the
same run,

    operations   n^2 / 2 visible pairs x 2 dim x (1 forward + 1 again and 2 gradients backward)

and the peak of resident memory, each measured in a process of its own. ``queries x keys`` would be
n^2 x 4 bytes for the scores alone.

Evaluation: tokens per second with local and long-term memory, and without memory; and against
scoring every position, as the paper's code does: as many windows of the same width, of which the
head and the memory are asked everywhere. (There the long-term memory is fed all positions too, but
it is full in both.)
"""

import argparse
import multiprocessing
import time

import numpy as np
import torch

from benchmarks.bench_extraction import model_of
from benchmarks.common import matmul_flops, paired, peak_megabytes, save
from memlm.core.merges import Union
from memlm.data.lexical import find_neighbours, greedy_chain
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import BlockWindows
from memlm.evaluation.perplexity import evaluate
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.training.objectives.config import Objective
from memlm.training.objectives.module import ObjectiveModule

HIDDEN, LAYERS, ROW, VOCABULARY = 256, 4, 256, 4096
BLOCK, CONTEXT, LONG = 64, 192, 4096


def training_step(method: str, positions: int):
    """A function that makes one step of ``positions`` targets."""
    module = ObjectiveModule(model_of(HIDDEN, LAYERS), Objective(method=method)).train()
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (positions // ROW, ROW + 1), generator=draw)
    batch = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:].contiguous()}

    def step() -> None:
        output = module(batch)
        (output.loss_sum / output.count).backward()
        module.zero_grad()

    return step


def peak(method: str, positions: int, threads: int) -> float:
    """Peak resident megabytes of a step, above those before it, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (method, positions, threads))


def _peak(method: str, positions: int, threads: int) -> float:
    torch.set_num_threads(threads)
    training_step("ce", ROW)()  # what the first step of any size allocates
    step = training_step(method, positions)
    before = peak_megabytes()
    step()
    return peak_megabytes() - before


def training(positions: int, threads: int, rounds: int, speed: float) -> dict:
    timed = paired(
        training_step("trime_long", positions), training_step("ce", positions), rounds=rounds
    )
    floor = positions**2 / 2 * 2 * HIDDEN * 4 / speed
    extra = timed["first_seconds"] - timed["second_seconds"]
    return {
        "memories": positions,
        "trime_seconds": timed["first_seconds"],
        "ce_seconds": timed["second_seconds"],
        "ratio": timed["ratio"],
        "ratio_range": timed["ratio_range"],
        "floor_ratio": 1 + floor / timed["second_seconds"],
        "extra_over_floor": extra / floor,
        "trime_peak_mb": peak("trime_long", positions, threads),
        "ce_peak_mb": peak("ce", positions, threads),
        "scores_mb": positions**2 * 4 / 1e6,
    }


def evaluation(tokens: int, threads: int, rounds: int) -> dict:
    model = model_of(HIDDEN, LAYERS)
    corpus = TokenCorpus.from_tokens(np.random.default_rng(0).integers(0, VOCABULARY, tokens + 1))
    windows = BlockWindows(block=BLOCK, context=CONTEXT)
    scale = HIDDEN**0.5
    memory = Together(
        LocalMemory(size=BLOCK + CONTEXT, temperature=scale),
        LongMemory(size=LONG, temperature=scale),
    )
    settings = {"threads": threads, "progress": False, "carry": "window"}
    timed = paired(
        lambda: evaluate(model, corpus, windows, memory=memory, merge=Union(), **settings),
        lambda: evaluate(model, corpus, windows, **settings),
        rounds=rounds,
    )
    everywhere = TokenCorpus.from_tokens(
        np.random.default_rng(0).integers(0, VOCABULARY, tokens // BLOCK * (BLOCK + CONTEXT) + 1)
    )
    whole = BlockWindows(block=BLOCK + CONTEXT, context=0)
    against = paired(
        lambda: evaluate(model, everywhere, whole, memory=memory, merge=Union(), **settings),
        lambda: evaluate(model, corpus, windows, memory=memory, merge=Union(), **settings),
        rounds=rounds,
    )
    return {
        "tokens": tokens,
        "block": BLOCK,
        "context": CONTEXT,
        "long": LONG,
        "with_memory_tokens_per_second": tokens / timed["first_seconds"],
        "without_tokens_per_second": tokens / timed["second_seconds"],
        "ratio": timed["ratio"],
        "ratio_range": timed["ratio_range"],
        "queries_saved": 1 - BLOCK / (BLOCK + CONTEXT),
        "every_position_ratio": against["ratio"],
        "every_position_ratio_range": against["ratio_range"],
    }


def grouping(blocks: int) -> dict:
    """Blocks of 256 tokens whose frequencies fall like those of words."""
    draw = np.random.default_rng(0)
    tokens = np.minimum(draw.zipf(1.2, (blocks, ROW)), 30_000)
    start = time.perf_counter()
    neighbours = find_neighbours(list(tokens), progress=False)
    found = time.perf_counter()
    greedy_chain(neighbours)
    return {
        "blocks": blocks,
        "block_tokens": ROW,
        "neighbour_seconds": found - start,
        "chain_seconds": time.perf_counter() - found,
        "blocks_per_second": blocks / (found - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="trime")
    options = parser.parse_args()
    speed = matmul_flops(options.threads)
    torch.set_num_threads(options.threads)
    save(
        options.name,
        {
            "model": {"hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY, "row": ROW},
            "matmul_gflops": speed / 1e9,
            "training": [
                training(positions, options.threads, options.rounds, speed)
                for positions in options.positions
            ],
            "evaluation": evaluation(options.tokens, options.threads, options.rounds),
            "grouping": [grouping(blocks) for blocks in options.blocks],
        },
    )


if __name__ == "__main__":
    main()
