"""What training with memory is worth: CE, TRIME, TRIME-long and TRIME-ext on Wikipedia articles.

Four models of one shape (a Llama of 1.18 M parameters, blocks of 256 tokens) read the same number
of tokens of the same articles; only the objective and its order of blocks differ (Zhong et al.
2022, section 4). Each is then measured on test articles

    alone              no memory
    cache              its own past articles and windows, mixed in (Grave et al. 2017)
    local              the window's own past, under one softmax with the vocabulary
    local + long       and the windows before
    local + long + ext and a datastore of training text, under the same softmax
    local + long, mixed  local and long under one softmax, with the datastore mixed in (eq. 7)
    kNN-LM             the datastore mixed in (on the CE model; Khandelwal et al. 2020)

Temperatures and weights are chosen on development articles, for each model and row. Every finished
training and row is kept in ``--work``: the same command goes on where it stopped, and ``--report``
only shows what there is.
"""

import argparse
import json
import lzma
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench_perplexity import upto
from benchmarks.common import save
from memlm.core.files import read_json, write_json
from memlm.core.merges import Merge, Mixture, Union
from memlm.core.types import TokenMemory
from memlm.data.documents import Document
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.tune import tune
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.store.reader import Datastore
from memlm.training.causal_lm import train_causal_lm
from memlm.training.config import TrainConfig
from memlm.training.tokenizer import train_tokenizer

METHODS = ("ce", "trime", "trime_long", "trime_ext")
VOCABULARY, LENGTH, BATCH = 4096, 256, 2048
WARM_UP = 0.05  # of the steps, plain cross-entropy first (section 5.1)
LONGEST = 6000  # characters of a measured article
WINDOWS = SlidingWindows(length=LENGTH, stride=LENGTH // 2)
LONG, NEIGHBOURS = 4096, 1024
SPREADS = (0.8, 1.2, 1.8)  # temperatures over sqrt(dim)
LAMS = (0.02, 0.05, 0.1, 0.2, 0.35)
MIXED_SPREADS, MIXED_LAMS = (0.4, 0.8), (0.05, 0.1, 0.2)

# What was chosen, memory, merge, and the datastore that is mixed in after it.
Setting = tuple[
    dict[str, float], TokenMemory | None, Merge | None, tuple[KnnMemory, Mixture] | None
]
Row = Iterator[Setting]


def articles(data: Path) -> dict[str, list[Document]]:
    """By split; measured articles are cut, so that no long one decides for all."""
    parts: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    with lzma.open(data / "wikipedia-2018" / "wikipedia.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            text = record["text"] if record["split"] == "train" else record["text"][:LONGEST]
            parts[record["split"]].append(Document(record["id"], text))
    return parts


def settings(method: str, seed: int, options: argparse.Namespace) -> TrainConfig:
    steps = max(1, options.tokens // BATCH)
    changes: dict[str, Any] = {
        "method": method,
        "memory_after": 0 if method == "ce" else round(WARM_UP * steps),
        "group_by": "bm25" if method == "trime_ext" else "text",
        "optimizer": "muon",
    }
    return TrainConfig.preset(
        "tiny",
        **changes,
        block_length=LENGTH,
        batch_tokens=BATCH,
        max_steps=steps,
        warmup_steps=min(50, steps // 4),
        save_every=100,
        threads=options.threads,
        seed=seed,
    )


def alone() -> Row:
    yield {}, None, None, None


def cache(scale: float) -> Row:
    for spread in SPREADS:
        for lam in LAMS:
            yield (
                {"temperature": spread, "lam": lam},
                Together(*past(spread * scale)),
                Mixture(lam=lam),
                None,
            )


def local(scale: float) -> Row:
    for spread in SPREADS:
        yield {"temperature": spread}, past(spread * scale)[0], Union(), None


def local_long(scale: float) -> Row:
    for spread in SPREADS:
        yield {"temperature": spread}, Together(*past(spread * scale)), Union(), None


def external(scale: float, store: Datastore) -> Row:
    for spread in SPREADS:
        memory = KnnMemory(store, k=NEIGHBOURS, temperature=spread * scale, index="exact")
        yield {"temperature": spread}, Together(*past(spread * scale), memory), Union(), None


def mixed_in(scale: float, store: Datastore) -> Row:
    for spread in MIXED_SPREADS:
        memory = KnnMemory(store, k=NEIGHBOURS, temperature=spread * scale, index="exact")
        for lam in MIXED_LAMS:
            chosen = {"temperature": spread, "lam": lam}
            yield chosen, Together(*past(scale)), Union(), (memory, Mixture(lam=lam))


def knn_lm(model: Any, dev: TokenCorpus, store: Datastore, threads: int) -> Row:
    memory = KnnMemory(store, k=NEIGHBOURS, temperature="auto", index="exact")
    tuned = tune(model, dev, WINDOWS, memory, ks=[memory.k], threads=threads, progress=False)
    best = tuned.best
    chosen = {"temperature": best.temperature, "lam": best.lam}
    yield chosen, memory.changed(best.k, best.temperature), tuned.merge, None


def past(temperature: float) -> tuple[LocalMemory, LongMemory]:
    """A window's own past and what was scored before it."""
    return (
        LocalMemory(size=LENGTH, temperature=temperature),
        LongMemory(size=LONG, temperature=temperature),
    )


def measure(
    model: Any, dev: TokenCorpus, test: TokenCorpus, row: Row, threads: int
) -> dict[str, Any]:
    """The best settings of a row on development text, and what they give on test text."""

    def loss(corpus: TokenCorpus, memory: Any, merge: Any, interpolate: Any):
        return evaluate(
            model,
            corpus,
            WINDOWS,
            memory=memory,
            merge=merge,
            interpolate=interpolate,
            carry="window",
            threads=threads,
            progress=False,
        )

    tried = [(loss(dev, *settings).loss, chosen, settings) for chosen, *settings in row]
    dev_loss, chosen, settings = min(tried, key=lambda entry: entry[0])
    result = loss(test, *settings)
    interval = result.interval()
    return {
        "chosen": chosen,
        "dev_perplexity": math.exp(dev_loss),
        "perplexity": result.perplexity,
        "interval": None if interval is None else [interval.low, interval.high],
        "protocol": result.describe(),
    }


def run(method: str, seed: int, parts: dict[str, Any], options: argparse.Namespace) -> None:
    """One training and its rows; whatever is there already is left as it is."""
    tokenizer, train, dev, test = (parts[name] for name in ("tokenizer", "train", "dev", "test"))
    folder = options.work / f"{method}-{seed}"
    train_causal_lm(train, tokenizer, settings(method, seed, options), folder, resume=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scale = model.config.hidden_size**0.5

    def store(metric: str) -> Datastore:
        return build_datastore(
            model,
            None,
            parts["remembered"],
            folder.with_name(f"{folder.name}-{metric}"),
            windows=WINDOWS,
            config=ExtractionConfig(metric=metric, threads=options.threads),  # type: ignore[arg-type]
        )

    rows: dict[str, Callable[[], Row]] = {
        "alone": alone,
        "cache": lambda: cache(scale),
        "local": lambda: local(scale),
        "local + long": lambda: local_long(scale),
        "local + long + ext": lambda: external(scale, store("ip")),
        "local + long, mixed": lambda: mixed_in(scale, store("ip")),
    }
    if method == "ce":
        rows["kNN-LM"] = lambda: knn_lm(model, dev, store("l2"), options.threads)
    for name, row in rows.items():
        place = folder.with_name(f"{folder.name}-{name.replace(' ', '')}.json")
        if not place.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a small store: fewer neighbours
                write_json(place, measure(model, dev, test, row(), options.threads))


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is finished, by method, seed and row."""
    found: dict[str, Any] = {}
    for method in METHODS:
        for seed in options.seeds:
            folder = options.work / f"{method}-{seed}"
            if not (folder / "training.json").exists():
                continue
            summary = read_json(folder / "training.json")
            training = {name: summary[name] for name in ("tokens", "seconds", "precision")}
            rows = {
                place.stem.removeprefix(f"{folder.name}-"): read_json(place)
                for place in sorted(folder.parent.glob(f"{folder.name}-*.json"))
            }
            found[f"{method}, seed {seed}"] = {**training, "rows": rows}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the corpora")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_trime_training"))
    parser.add_argument("--tokens", type=int, default=3_000_000, help="read by every training")
    parser.add_argument("--store-tokens", type=int, default=300_000, help="in the datastore")
    parser.add_argument("--dev-characters", type=int, default=60_000)
    parser.add_argument("--test-characters", type=int, default=150_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--all-seeds", nargs="+", default=["ce", "trime"], choices=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only show what is finished")
    options = parser.parse_args()
    # Other numbers are another experiment.
    sizes = (options.tokens, options.store_tokens, options.dev_characters, options.test_characters)
    options.work = options.work / "-".join(map(str, sizes))
    if not options.report:
        options.work.mkdir(parents=True, exist_ok=True)
        parts = prepare(options)
        for number, seed in enumerate(options.seeds):
            for method in METHODS if number == 0 else options.all_seeds:
                run(method, seed, parts, options)
                save("trime_training", {"protocol": protocol(options), "runs": report(options)})
    save("trime_training", {"protocol": protocol(options), "runs": report(options)})


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenizer and texts; training text is cut to about the tokens that are read."""
    parts = articles(options.data)
    train = upto(parts["train"], 5 * options.tokens)
    kept = options.work / "tokenizer"
    if not (kept / "tokenizer.json").exists():
        train_tokenizer(train, VOCABULARY, exact=False).save_pretrained(kept)
    tokenizer = AutoTokenizer.from_pretrained(kept)
    corpus = tokenize(train, tokenizer)
    inside = max(1, int((corpus.offsets[1:] <= options.store_tokens).sum()))
    remembered = TokenCorpus.from_tokens(
        corpus.tokens[: corpus.offsets[inside]],
        corpus.offsets[: inside + 1],
        names=corpus.names[:inside],
        begin_token=corpus.begin_token,
    )
    return {
        "tokenizer": tokenizer,
        "train": corpus,
        "remembered": remembered,
        "dev": tokenize(upto(parts["valid"], options.dev_characters), tokenizer),
        "test": tokenize(upto(parts["test"], options.test_characters), tokenizer),
    }


def protocol(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokens": options.tokens,
        "store_tokens": options.store_tokens,
        "windows": WINDOWS.to_dict(),
        "long": LONG,
        "neighbours": NEIGHBOURS,
        "search": "exact",
        "longest_measured_article": LONGEST,
        "dev_characters": options.dev_characters,
        "test_characters": options.test_characters,
    }


if __name__ == "__main__":
    main()
