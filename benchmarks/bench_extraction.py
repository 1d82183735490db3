"""Extraction against its floor: the bare forward pass of the model's body, without the head.

Same batches, same threads, files and fsync included, identity and plan included.
Target: at least 90 % of the body's tokens per second.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import paired, save
from memlm.data.batches import make_batch, plan_batches
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.models.taps import body


def model_of(hidden: int, layers: int, vocab: int = 4096) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def measure(hidden: int, layers: int, tokens: int, rounds: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    model = model_of(hidden, layers)
    corpus = TokenCorpus.from_tokens(np.random.default_rng(0).integers(0, 4096, tokens))
    windows = SlidingWindows(length=256, stride=256)
    config = ExtractionConfig(batch_tokens=8192, threads=threads)
    table = windows.table(corpus)
    batches = [
        make_batch(corpus, table, numbers) for numbers in plan_batches(table, batch_tokens=8192)
    ]

    def forward():
        with torch.inference_mode():
            for batch in batches:
                body(model)(input_ids=batch.input_ids, use_cache=False)

    def extract():
        with tempfile.TemporaryDirectory() as folder:
            build_datastore(
                model,
                None,
                corpus,
                Path(folder) / "s",
                windows=windows,
                config=config,
                progress=False,
            )

    timing = paired(extract, forward, rounds=rounds)
    return {
        "parameters": model.num_parameters(),
        "hidden": hidden,
        "layers": layers,
        "tokens": tokens,
        "extraction_tokens_per_second": tokens / timing["first_seconds"],
        "body_tokens_per_second": tokens / timing["second_seconds"],
        "extraction_speed_over_body": 1 / timing["ratio"],
        **timing,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sizes = [(128, 4, 200_000), (256, 4, 100_000), (512, 8, 20_000)]
    cases = [measure(h, n, t, options.rounds, options.threads) for h, n, t in sizes]
    save("extraction", {"windows": "256 tokens, stride 256", "cases": cases})


if __name__ == "__main__":
    main()
