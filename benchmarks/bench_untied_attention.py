"""Step time and peak memory of untied positions against none and against the written-out table.

    python -m benchmarks.bench_untied_attention
    python -m benchmarks.bench_untied_attention --device cuda --precision bfloat16

Two layers of width 256 with 4 heads, 4,096 tokens in a batch (one row at least), a vocabulary of
512. Every case runs in a process of its own; its peak is the greatest resident memory (on a GPU:
memory allocated there) minus that before the first step. Times are medians of the steps after the
first. The cases of FlexAttention are compiled, and measured, on a GPU only.
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
COMPILED = {
    "TUPE-A flex": ("tupe-a", "flex_attention"),
    "TUPE-R flex": ("tupe-r", "flex_attention"),
}


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, length: int, options: argparse.Namespace, *, learn: bool) -> dict:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, dtype = options.device, getattr(torch, options.precision)
    scheme, implementation = (CASES | COMPILED)[case]
    config = TupeConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=max(LENGTHS), scheme=scheme,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = TupeForMaskedLM(config).train(learn).to(device)
    model.set_attn_implementation(implementation)
    tokens = torch.randint(7, 512, (max(1, TOKENS // length), length)).to(device)
    labels = tokens.masked_fill(torch.rand(tokens.shape).to(device) > 0.15, -100)

    def step():
        half = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(learn), half:
            loss = model(tokens, labels=labels).loss
        if learn:
            loss.backward()
            model.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    before = peak_bytes(device)
    times = [seconds(step) for _ in range(options.rounds + 1)][1:]
    return {
        "case": case,
        "length": length,
        "learning": learn,
        "seconds": statistics.median(times),
        "peak_megabytes": (peak_bytes(device) - before) / 1e6,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--case", nargs=3, metavar=("NAME", "LENGTH", "LEARN"))
    options = parser.parse_args()
    if options.case:
        name, length, learn = options.case
        print(json.dumps(measure(name, int(length), options, learn=learn == "1")))
        return
    rows, cases = [], CASES if options.device == "cpu" else CASES | COMPILED
    for length in LENGTHS:
        for learn in "01":
            for name in cases:
                command = [sys.executable, "-m", "benchmarks.bench_untied_attention"]
                for option in ("rounds", "threads", "device", "precision"):
                    command += [f"--{option}", str(getattr(options, option))]
                ran = subprocess.run(
                    [*command, "--case", name, str(length), learn],
                    check=True, capture_output=True, text=True,
                )  # fmt: skip
                rows.append(json.loads(ran.stdout.splitlines()[-1]))
                print(rows[-1], file=sys.stderr)
    torch.set_num_threads(options.threads)
    name = "untied_attention" if options.device == "cpu" else "untied_attention_gpu"
    protocol = {"protocol": " ".join((__doc__ or "").split()), "precision": options.precision}
    save(name, {**protocol, "rows": rows})


if __name__ == "__main__":
    main()
