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

Grouping: neighbours of blocks of 256 tokens whose frequencies fall like those of words, the chain,
and what asking bm25s for one block after another would take (from 50 of them), in seconds of
processor time, which other work on the machine changes little.

``--part`` runs some of these alone; the others' results stay. Every row is saved when it is there.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.bench_extraction import model_of
from benchmarks.common import RESULTS, machine, matmul_flops, paired, peak_megabytes, save
from memlm.core.merges import Union
from memlm.core.optional import require
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


def apart(work, *arguments):
    """What a function returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(work, arguments)


def peak(method: str, positions: int, threads: int) -> float:
    """Peak resident megabytes of a step, above those before it."""
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
        "trime_peak_mb": apart(peak, "trime_long", positions, threads),
        "ce_peak_mb": apart(peak, "ce", positions, threads),
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
    """The chain of some blocks."""
    draw = np.random.default_rng(0)
    tokens = list(np.minimum(draw.zipf(1.2, (blocks, ROW)), 30_000))
    before = peak_megabytes()
    start = time.process_time()
    neighbours = find_neighbours(tokens, progress=False)
    found = time.process_time()
    greedy_chain(neighbours)
    chained = time.process_time()
    peak = peak_megabytes() - before
    return {
        "blocks": blocks,
        "block_tokens": ROW,
        "neighbour_seconds": found - start,
        "chain_seconds": chained - found,
        "blocks_per_second": blocks / (found - start),
        "peak_mb": peak,
        "one_by_one_seconds": one_by_one(tokens, sample=50),
    }


def one_by_one(tokens: list[np.ndarray], *, sample: int) -> float:
    """Seconds of asking bm25s for the neighbours of every block, from some of them."""
    bm25s = require("bm25s", extra="bm25", purpose="be compared with")
    numbers, places = np.unique(np.stack(tokens), return_inverse=True)
    terms = places.reshape(len(tokens), -1)
    vocabulary = {str(number): term for term, number in enumerate(numbers.tolist())}
    index = bm25s.BM25(k1=0.9, b=0.4)
    corpus = bm25s.tokenization.Tokenized(ids=terms.tolist(), vocab=vocabulary)
    start = time.process_time()
    index.index(corpus, show_progress=False)
    built = time.process_time()
    for row in terms[:sample]:
        scores = index.get_scores_from_ids(np.unique(row))
        np.argpartition(scores, -21)[-21:]
    asked = time.process_time()
    return built - start + (asked - built) / sample * len(tokens)


def rows_of(part: str, options: argparse.Namespace, speed: float) -> Iterator[dict]:
    """The measurements of a part, one after another."""
    if part == "training":
        for positions in options.positions:
            yield training(positions, options.threads, options.rounds, speed)
    elif part == "evaluation":
        yield evaluation(options.tokens, options.threads, options.rounds)
    else:
        for blocks in options.blocks:
            yield apart(grouping, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("training", "evaluation", "grouping")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2000, 8000, 20_000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="trime")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # of NumPy, in processes begun from here on
    os.environ["OPENBLAS_NUM_THREADS"] = str(options.threads)
    file = RESULTS / f"{options.name}.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in ("benchmark", "date", "machine"):  # of the whole; parts have their own
        result.pop(name, None)
    model = {"hidden": HIDDEN, "layers": LAYERS, "vocabulary": VOCABULARY, "row": ROW}
    result = {"model": model, **result}
    for part in options.part:
        speed = matmul_flops(options.threads)
        found: dict = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        found |= {"matmul_gflops": speed / 1e9, "rows": []}
        result[part] = found
        for row in rows_of(part, options, speed):
            found["rows"].append(row)
            save(options.name, result)


if __name__ == "__main__":
    main()
