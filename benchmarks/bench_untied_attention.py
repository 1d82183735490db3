"""Step time and peak memory of untied positions against none and against the written-out table.

    python -m benchmarks.bench_untied_attention

Two layers of width 256 with 4 heads, 4,096 tokens in a batch (one row at least), a vocabulary of
512, float32. Every case runs in a process of its own; its peak is the greatest resident memory
minus that before the first step. Times are medians of the steps after the first.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch

from benchmarks.common import save, seconds
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForMaskedLM

LENGTHS = (128, 512, 2048)
TOKENS = 4096
NONE = {"absolute": "none", "relative": False, "reset": False}
CASES = {
    "no position term": (NONE, "sdpa"),
    "TUPE-A folded": ("tupe-a", "sdpa"),
    "TUPE-R folded": ("tupe-r", "sdpa"),
    "TUPE-A table": ("tupe-a", "eager"),
    "TUPE-R table": ("tupe-r", "eager"),
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, length: int, *, learn: bool, rounds: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    scheme, implementation = CASES[case]
    config = TupeConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=max(LENGTHS), scheme=scheme,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = TupeForMaskedLM(config).train(learn)
    model.set_attn_implementation(implementation)
    tokens = torch.randint(7, 512, (max(1, TOKENS // length), length))
    labels = tokens.masked_fill(torch.rand(tokens.shape) > 0.15, -100)

    def step():
        with torch.set_grad_enabled(learn):
            loss = model(tokens, labels=labels).loss
        if learn:
            loss.backward()
            model.zero_grad()

    before = peak_bytes()
    times = [seconds(step) for _ in range(rounds + 1)][1:]
    return {
        "case": case,
        "length": length,
        "learning": learn,
        "seconds": statistics.median(times),
        "peak_megabytes": (peak_bytes() - before) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", nargs=3, metavar=("NAME", "LENGTH", "LEARN"))
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "threads": options.threads}
    if options.case:
        name, length, learn = options.case
        print(json.dumps(measure(name, int(length), learn=learn == "1", **settings)))
        return
    rows = []
    for length in LENGTHS:
        for learn in "01":
            for name in CASES:
                command = [sys.executable, "-m", "benchmarks.bench_untied_attention"]
                command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
                ran = subprocess.run(
                    [*command, "--case", name, str(length), learn],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                rows.append(json.loads(ran.stdout.splitlines()[-1]))
                print(rows[-1], file=sys.stderr)
    torch.set_num_threads(options.threads)
    save("untied_attention", {"protocol": " ".join((__doc__ or "").split()), "rows": rows})


if __name__ == "__main__":
    main()
