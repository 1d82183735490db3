"""The six position schemes on Wikipedia: masked-token loss against the step, then GLUE tasks.

    python -m benchmarks.bench_tupe_schemes --data DATA --out runs/schemes
    python -m benchmarks.bench_tupe_schemes --data DATA --out runs/schemes --glue cola rte stsb

One vocabulary and one stream of blocks for all; models of 4 layers and width 128; every run reads
the same blocks with the same masks. The headline pair, TUPE-R and BERT-R, is run with several
seeds, the other schemes with one. Held-out text is the corpus' own validation split, its masks
fixed. Says at which step a scheme first goes below the final held-out loss of BERT-A. Repeat the
command to go on.

So few tokens teach little, and AdamW stays at the frequencies of words; therefore Muon, a small
vocabulary, three tokens of ten masked, no dropout: the recipe of a small budget, not the paper's.
"""

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, save
from memlm.data.cleaning import CorpusCounts, prepare
from memlm.evaluation.figures import panels
from memlm.models.tupe.heads import TupeForSequenceClassification
from memlm.positions.scheme import SCHEMES
from memlm.training.finetune import finetune
from memlm.training.finetune_config import FinetuneConfig
from memlm.training.masked_lm import tokenize_sentences, train_masked_lm
from memlm.training.masked_lm_config import MaskedLMConfig
from memlm.training.sentence_tokenizer import train_sentence_tokenizer

HEADLINE = ("tupe-r", "bert-r")
BASELINE = "bert-a"
FOLDERS = {"cola": "CoLA", "rte": "RTE", "stsb": "STS-B"}


def sentences(data: Path, split: str, characters: int, counts: CorpusCounts) -> list[str]:
    path = data / "wikipedia-2018" / "wikipedia.jsonl.xz"
    texts, room = [], characters
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            if record["split"] == split and room > 0:
                texts.append(record["text"][:room])
                room -= len(record["text"])
    return [sentence for paragraph in prepare(texts, counts) for sentence in paragraph]


def plot(rows: list[dict[str, Any]]) -> None:
    """Held-out loss against the step, a line a run."""
    figure, (axis,) = panels(1)
    for row in rows:
        steps, losses = zip(*row["curve"], strict=True)
        axis.plot(steps, losses, label=f"{row['scheme']}, seed {row['seed']}")
    axis.set(xlabel="steps", ylabel="loss of masked held-out tokens, nats")
    axis.legend()
    figure.savefig(RESULTS / "tupe_schemes.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400, help="of 1,024 tokens")
    parser.add_argument("--characters", type=int, default=12_000_000, help="of training text")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--glue", nargs="*", default=[], choices=sorted(FOLDERS))
    parser.add_argument("--glue-seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()

    counts = CorpusCounts()
    texts = sentences(options.data, "train", options.characters, counts)
    held = sentences(options.data, "valid", options.characters // 40, CorpusCounts())
    tokenizer = train_sentence_tokenizer(texts, options.vocab_size)
    learnt, held_out = tokenize_sentences(texts, tokenizer), tokenize_sentences(held, tokenizer)

    rows, last = [], {}
    for scheme in SCHEMES:
        for seed in options.seeds if scheme in HEADLINE else options.seeds[:1]:
            config = MaskedLMConfig(
                scheme=scheme, seed=seed, max_steps=options.steps, threads=options.threads,
                warmup_steps=options.steps // 20, evaluate_every=max(1, options.steps // 20),
                save_every=max(1, options.steps // 4), keep_last=1, log_every=20,
                batch_tokens=1024, optimizer="muon", dropout=0.0, mask_prob=0.3,
            )  # fmt: skip
            out = options.out / f"{scheme}-seed-{seed}"
            train_masked_lm(learnt, tokenizer, config, out, held_out=held_out, resume=out.exists())
            run = json.loads((out / "training.json").read_text(encoding="utf-8"))
            curve = [[point["step"], point["loss"]] for point in run["evaluations"]]
            last[scheme, seed] = run["held_out"]["loss"]
            rows.append(
                {
                    "scheme": scheme,
                    "seed": seed,
                    "parameters": run["parameters"],
                    "held_out_nats": run["held_out"]["loss"],
                    "curve": curve,
                    "seconds": run["seconds"],
                }
            )
    goal = last[BASELINE, options.seeds[0]]
    for row in rows:
        row["reaches_baseline_at"] = next((s for s, loss in row["curve"] if loss <= goal), None)

    tasks = {}
    for task in options.glue:
        for scheme in SCHEMES:
            source = options.out / f"{scheme}-seed-{options.seeds[0]}"
            config = FinetuneConfig(
                task=task, learning_rates=(5e-4,), seeds=tuple(options.glue_seeds), epochs=3,
                max_length=128, threads=options.threads,
            )  # fmt: skip
            table = finetune(
                lambda labels, source=source: TupeForSequenceClassification.from_pretrained(
                    source, num_labels=labels
                ),
                tokenizer,
                options.data / "glue" / FOLDERS[task],
                config,
                options.out / "glue" / task / scheme,
                quiet=True,
            )
            tasks.setdefault(task, {})[scheme] = table["best"]
    save(
        "tupe_schemes",
        {
            "protocol": " ".join((__doc__ or "").split()),
            "settings": {name: str(value) for name, value in vars(options).items()
                         if name not in ("data", "out")},
            "corpus": counts.describe(),
            "tokens": len(learnt.tokens),
            "rows": rows,
            "glue": tasks,
        },
    )  # fmt: skip
    plot(rows)


if __name__ == "__main__":
    main()
