"""Run every benchmark that needs no data, one after another, each in a process of its own."""

import subprocess
import sys

from benchmarks import tables

BENCHMARKS = (
    "bench_import",
    "bench_extraction",
    "bench_evaluation",
    "bench_automaton",
    "bench_trime",
    "bench_retro",
    "bench_untied_attention",
    "bench_middle",
)


def main():
    for name in BENCHMARKS:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    tables.main()


if __name__ == "__main__":
    main()
