"""`import memlm` and `memlm --help`, as whole processes. Targets: 0.3 s and 1 s."""

import argparse
import statistics
import subprocess
import sys

from benchmarks.common import save, seconds


def median_seconds(command: list[str], rounds: int) -> float:
    def run():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    run()
    return statistics.median(seconds(run) for _ in range(rounds))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    python = sys.executable
    empty = median_seconds([python, "-c", "pass"], rounds)
    save(
        "import",
        {
            "python_start_seconds": empty,
            "import_seconds": median_seconds([python, "-c", "import memlm"], rounds) - empty,
            "help_seconds": median_seconds([python, "-m", "memlm.cli.main", "--help"], rounds),
            "verb_help_seconds": median_seconds(
                [python, "-m", "memlm.cli.main", "evaluate", "--help"], rounds
            ),
        },
    )


if __name__ == "__main__":
    main()
