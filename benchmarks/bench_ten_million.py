"""Ten million keys against what the planner said: bytes, time and memory of an index, and searches.

Keys of the made-up text of `bench_automaton` (256 dimensions, float16). The index is built from the
store on disk by one thread; time is processor time, so that other work on the machine does not
count, beside the planner's operations at the speed that was measured just before.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.bench_automaton import DIM, NEIGHBOURS, Text, make_store
from benchmarks.common import save
from memlm.core.threads import multiply_adds_per_second
from memlm.index.build import build_index, load_index
from memlm.index.plan import IndexConfig, plan_index
from memlm.store.reader import Datastore


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--store", type=Path, help="a store that bench_automaton kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.store or Path(temporary) / "store"
        made = None
        if not (folder / "manifest.json").exists():
            start = time.process_time()
            make_store(folder, Text(), options.entries)
            made = time.process_time() - start
        store = Datastore.open(folder)
        before = peak_gigabytes()
        config = IndexConfig(type="ivfpq", train_size=64 * 4096)
        plan = plan_index(len(store), store.dim, config)
        speed = multiply_adds_per_second()
        directory = Path(temporary) / "index"
        start = time.process_time()
        built = build_index(store, config, directory=directory, threads=1)
        seconds = time.process_time() - start
        after = peak_gigabytes()
        start = time.process_time()
        index = load_index(directory, store, threads=1)
        loaded = time.process_time() - start
        text = Text(drawn=3)
        queries = text.keys(text.tokens(1, options.queries))[0]
        index.search(queries[:8], NEIGHBOURS)
        start = time.process_time()
        for query in queries.split(1):
            index.search(query, NEIGHBOURS)
        searched = (time.process_time() - start) / len(queries)
        save(
            "ten-million",
            {
                "entries": len(store),
                "dim": DIM,
                "factory": plan.factory,
                "recall": built.describe()["recall"],
                "store_processor_seconds": made,
                "planned_bytes": plan.bytes,
                "bytes": (directory / "index.faiss").stat().st_size,
                "planned_operations": plan.operations,
                "speed": speed,
                "planned_seconds": plan.seconds(speed),
                "build_processor_seconds": seconds,
                "load_processor_seconds": loaded,
                "milliseconds_per_search": 1000 * searched,
                "peak_gigabytes_before": before,
                "peak_gigabytes": after,
            },
        )


if __name__ == "__main__":
    main()
