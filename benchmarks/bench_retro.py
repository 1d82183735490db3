"""RETRO: a training step, and a generated token, against the published package.

    python -m benchmarks.bench_retro --package /path/to/python-with-retro-pytorch

Both models have one configuration (width 256, 6 + 2 layers, 8 heads of 32, chunks of 64, two
neighbours of 128) and the same random tokens; each measurement has a process of its own, in turn.
A step is forward, backward and AdamW over one sequence of 512 tokens. A generated token: ours,
the mean over 64 steps with the cache, one of which retrieves; the package's, one pass over the
whole text, which is what it does for every token. Without ``--package`` the comparison is with
reading the whole text at every token.

The ceiling is the arithmetic of the step (`flops`) at the speed of a large matrix product here;
``--shares`` says where the time of a step goes (`bench_retro_pipeline`: the same for the data).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

CHUNK, K, LENGTH = 64, 2, 128
WIDTH, LAYERS, ENCODER_LAYERS, HEADS, HEAD = 256, 6, 2, 8, 32
CROSS, VOCABULARY, TIME, POSITIONS = (1, 3, 6), 8192, 512, 2176
LENGTHS = (64, 256, 512, 2048)
STEPS, ROUNDS = 5, 2


def flops(time_: int) -> float:
    """Multiplications and additions of a forward pass over one sequence (causal half counted)."""
    inner = HEADS * HEAD
    read = time_ // CHUNK * K * LENGTH
    decoder = 8 * time_ * WIDTH * inner + 2 * time_**2 * inner + 16 * time_ * WIDTH**2
    cross = 4 * (time_ + read) * WIDTH * inner + 4 * time_ * K * LENGTH * inner
    encoder = (
        (8 + 4) * read * WIDTH * inner
        + 4 * read * (LENGTH + CHUNK) * inner
        + 4 * time_ * WIDTH * inner
        + 16 * read * WIDTH**2
    )
    logits = 2 * time_ * WIDTH * VOCABULARY
    return LAYERS * decoder + len(CROSS) * cross + ENCODER_LAYERS * encoder + logits


def ours():
    from memlm.models.retro.causal_lm import RetroForCausalLM
    from memlm.models.retro.config import RetroConfig

    config = RetroConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        head_dim=HEAD,
        encoder_hidden_size=WIDTH,
        encoder_num_layers=ENCODER_LAYERS,
        chunk_size=CHUNK,
        cross_attention_layers=CROSS,
        encoder_cross_attention_layers=range(1, ENCODER_LAYERS + 1),
        shared_embeddings=True,
        learned_positions=True,
        max_position_embeddings=POSITIONS,
        head_bias=True,
    )
    return RetroForCausalLM(config)


def package():
    from retro_pytorch import RETRO  # type: ignore[import-not-found]

    return RETRO(
        num_tokens=VOCABULARY,
        max_seq_len=POSITIONS,
        enc_dim=WIDTH,
        enc_depth=ENCODER_LAYERS,
        dec_dim=WIDTH,
        dec_depth=LAYERS,
        dec_cross_attn_layers=CROSS,
        heads=HEADS,
        dim_head=HEAD,
        chunk_size=CHUNK,
    )


def made_up(time_: int):
    import torch

    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (1, time_ + 1))
    return tokens, torch.randint(1, VOCABULARY, (1, time_ // CHUNK, K, LENGTH))


def measure_step(which: str) -> dict:
    """Median seconds of a training step, and by how much the process grew."""
    import torch

    model = (ours if which == "ours" else package)().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, neighbours = made_up(TIME)
    before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(STEPS):
        begun = time.perf_counter()
        if which == "ours":
            loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:], neighbours=neighbours).loss
        else:
            loss = model(tokens, retrieved=neighbours, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": statistics.median(times[1:]), "megabytes": (after - before) / 1024}


def measure_tokens(which: str) -> dict:
    """Seconds per generated token behind texts of several lengths."""
    import torch

    model = (package if which == "package" else ours)().eval()
    found = {}
    for length in LENGTHS:
        tokens, neighbours = made_up(length + CHUNK)
        begun = time.perf_counter()
        with torch.no_grad():
            if which == "ours":
                first = neighbours[:, : length // CHUNK]
                cache = model(tokens[:, :length], neighbours=first).past_key_values
                begun = time.perf_counter()
                for place in range(length, length + CHUNK):
                    last = neighbours[:, -1:] if (place + 1) % CHUNK == 0 else None
                    new = tokens[:, place : place + 1]
                    model(new, neighbours=last, past_key_values=cache)
                found[length] = (time.perf_counter() - begun) / CHUNK
            elif which == "whole":
                model(tokens[:, :length], neighbours=neighbours[:, : length // CHUNK])
                found[length] = time.perf_counter() - begun
            else:
                model(tokens[:, :length], retrieved=neighbours[:, : length // CHUNK])
                found[length] = time.perf_counter() - begun
    return found


def measure_shares(which: str) -> dict:
    """Shares of a training step's time in matrix products, in attention, and in all the rest."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    model = (ours if which == "ours" else package)().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, neighbours = made_up(TIME)

    def step():
        model(tokens[:, :-1], shift_labels=tokens[:, 1:], neighbours=neighbours).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(STEPS - 1):
            step()
    spent = {"matrix products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in seen.key_averages():
        attention = "scaled_dot_product" in event.key
        products = event.key in ("aten::mm", "aten::addmm", "aten::bmm")
        kind = "attention" if attention else "matrix products" if products else "rest"
        spent[kind] += event.self_cpu_time_total
    return {kind: part / sum(spent.values()) for kind, part in spent.items()}


def worker(python: str, what: str, which: str, threads: int) -> dict:
    command = [python, __file__, "--worker", what, which, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(python: str | None, threads: int) -> dict:
    """All measurements, the two sides in turn."""
    other = "package" if python else "whole"
    steps: dict[str, list] = {}
    tokens: dict[str, list] = {}
    for _ in range(ROUNDS):
        for which in ("ours", other):
            here = python if python and which == "package" else sys.executable
            tokens.setdefault(which, []).append(worker(here, "tokens", which, threads))
            if which != "whole":
                steps.setdefault(which, []).append(worker(here, "step", which, threads))
    best = {
        which: {key: min(run[key] for run in runs) for key in ("seconds", "megabytes")}
        for which, runs in steps.items()
    }
    per_token = {
        which: {n: min(run[str(n)] for run in runs) for n in LENGTHS}
        for which, runs in tokens.items()
    }
    result: dict = {
        "training_step": best,
        "seconds_per_token": per_token,
        "ratio_per_token": {n: per_token[other][n] / per_token["ours"][n] for n in LENGTHS},
        "compared_with": "retro-pytorch" if python else "reading the whole text",
    }
    if python:
        for key in ("seconds", "megabytes"):
            result[f"ratio_{key}"] = best["package"][key] / best["ours"][key]
    return result


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--package", help="a Python that can import retro_pytorch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shares", action="store_true", help="only: where a step's time goes")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import torch

        torch.set_num_threads(options.threads)
        what, which = options.worker
        jobs = {"step": measure_step, "tokens": measure_tokens, "shares": measure_shares}
        print(json.dumps(jobs[what](which)))
        return
    from benchmarks.common import matmul_flops, save

    if options.shares:
        shares = worker(sys.executable, "shares", "ours", options.threads)
        save("retro_shares", {"shares_of_a_step": shares})
        return
    result = compare(options.package, options.threads)
    ceiling = 3 * flops(TIME) / matmul_flops(options.threads)
    steps = result["training_step"]
    if "ours" in steps:
        result["percent_of_ceiling"] = 100 * ceiling / steps["ours"]["seconds"]
    save("retro", {"flops_of_a_step": 3 * flops(TIME), **result})


if __name__ == "__main__":
    main()
