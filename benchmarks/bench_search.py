"""Exact search against its floor: the bare matrix products over the same blocks, cast included.

No search can be exact without those products; everything above 1 is picking out the k nearest.
Beside it the plain way: scores of a block, `torch.topk`, merge with `torch.topk`.
Target: at most 1.5 times the floor at 64 queries and more.

Run: python -m benchmarks.bench_search [--keys N] [--dim D] [--k K] [--threads T]
"""

import argparse

import torch

from benchmarks.common import matmul_flops, paired, save
from memlm.index.exact import ExactIndex

FLOOR_ROWS = 8192
PLAIN_ROWS = 65_536


def random_keys(count: int, dim: int) -> torch.Tensor:
    torch.manual_seed(0)
    keys = torch.empty(count, dim, dtype=torch.float16)
    for block in keys.split(50_000):
        block.copy_(torch.randn(len(block), dim))
    return keys


def floor(keys: torch.Tensor, queries: torch.Tensor) -> None:
    buffer = torch.empty(FLOOR_ROWS, keys.shape[1])
    for block in keys.split(FLOOR_ROWS):
        for part in queries.split(256):
            torch.mm(part, buffer[: len(block)].copy_(block).T)


def plain(keys: torch.Tensor, norms: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    best = torch.empty(len(queries), 0)
    ids = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(keys), PLAIN_ROWS):
        block = keys[start : start + PLAIN_ROWS].float()
        scores = torch.addmm(norms[start : start + len(block)], queries, block.T, beta=-1, alpha=2)
        found, columns = torch.topk(scores, min(k, len(block)))
        best = torch.cat([best, found], 1)
        ids = torch.cat([ids, columns + start], 1)
        best, order = torch.topk(best, min(k, best.shape[1]))
        ids = ids.gather(1, order)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 256])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    keys = random_keys(given.keys, given.dim)
    norms = torch.cat([block.float().square().sum(-1) for block in keys.split(PLAIN_ROWS)])
    index = ExactIndex(keys)
    runs = []
    for count in given.queries:
        queries = torch.randn(count, given.dim)
        against = {
            "floor": lambda q=queries: floor(keys, q),
            "plain": lambda q=queries: plain(keys, norms, q, given.k),
        }
        for name, other in against.items():
            timed = paired(lambda q=queries: index.search(q, given.k), other, rounds=given.rounds)
            milliseconds = 1000 * timed["first_seconds"] / count
            runs.append({"queries": count, "against": name, "ms_per_query": milliseconds, **timed})
    operations = 2 * given.keys * given.dim
    save(
        "search",
        {
            "keys": given.keys,
            "dim": given.dim,
            "k": given.k,
            "operations_per_query": operations,
            "ms_per_query_at_peak": 1000 * operations / matmul_flops(given.threads),
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
