"""The tables of the RetoMaton paper in shape (Alon et al. 2022, section 5), on a small model.

Perplexity against the fraction of saved searches, in three cases:

    in-domain     a model of stories, a datastore of stories, measured on other stories
    adaptation    the same model, a datastore of the United States Code, measured on other sections
    fine-tuned    the same after fine-tuning on the sections that the datastore is made of

and for four ways to save searches: kNN-LM that searches at a random share of positions, or only
where the model is unsure of its likeliest token, RetoMaton without clusters, RetoMaton with them;
for RetoMaton `min_knns` sweeps from 1 (most saved) to never reached (none saved). lam and the
temperature are chosen per case on held-out documents, by kNN-LM with a search at every position;
all methods score their candidates by exact distances, and search one IVF-PQ index whose recall is
printed. Protocol: sliding windows within documents, state carried through each document.

Line breaks are read as spaces, and neither an end token nor a tokenizer's leading space is made
where the model was not trained on it: a few hundred such tokens, hopeless for the model and obvious
to a memory, would otherwise be most of the gain. The stories come from the corpus the model was
trained on, so their base perplexity may be in-sample.

Writes a JSON and a plot under `benchmarks/results`; the defaults take about ten minutes on two
cores.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import Metaspace
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench_perplexity import WINDOWS, splits, upto
from benchmarks.common import RESULTS, save, save_picture
from memlm.core.optional import require
from memlm.core.threads import torch_threads
from memlm.core.types import TokenMemory
from memlm.data.documents import Document
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.result import Evaluation
from memlm.evaluation.tune import tune
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.skipping import SkippingMemory
from memlm.methods.demo import index_config
from memlm.methods.knn_lm import index_store
from memlm.training.blocks import TrainingBlocks, collate, pack
from memlm.training.schedule import Schedule

CASES = {"in-domain": "tinystories", "adaptation": "uscode", "fine-tuned": "uscode"}
KNN, UNSURE = "kNN-LM, random", "kNN-LM, where the model is unsure"
PLAIN, CLUSTERED = "RetoMaton w/o clusters", "RetoMaton"
METHODS = (KNN, UNSURE, PLAIN, CLUSTERED)
WITHOUT_LEADING_SPACE = ("tinystories-656k",)
NEVER = 10**9
MIN_KNNS = (1, 8, 64, NEVER)
SHARES = (0.0, 0.25, 0.5, 0.75)
BOUNDS = (0.9, 0.7, 0.5, 0.35, 0.25, 0.15)  # of the likeliest token's probability
ITERATIONS, ROWS, RATE = 5, 16, 1e-3


def fine_tune(model, corpus: TokenCorpus, steps: int, threads: int):
    """Plain cross-entropy on blocks of the corpus, the rate falling linearly to zero."""
    blocks = TrainingBlocks(pack(corpus), WINDOWS.length, items=steps * ROWS, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = LambdaLR(optimizer, Schedule("linear", 20, steps))
    model.train()
    with torch_threads(threads):
        for batch in DataLoader(blocks, batch_size=ROWS, collate_fn=collate):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    model.eval()


def in_one_line(documents: list[Document], characters: int | None = None) -> list[Document]:
    """Documents without line breaks, cut to a length so that they can be walked side by side."""
    return [
        Document(document.name, " ".join(document.text.split())[:characters])
        for document in documents
    ]


def memories(knn: KnnMemory, clusters) -> list[tuple[str, dict[str, Any], TokenMemory]]:
    """Method, setting and memory of every point of the curves."""
    points: list[tuple[str, dict[str, Any], TokenMemory]] = [
        (KNN, {"share": share}, SkippingMemory(knn, share=share)) for share in SHARES
    ]
    points += [(UNSURE, {"skip_above": bound}, knn) for bound in BOUNDS]
    settings: dict[str, Any] = {"k": knn.k, "temperature": knn.temperature}
    for label, states in ((PLAIN, None), (CLUSTERED, clusters)):
        walking = AutomatonMemory(knn.store, **settings, clusters=states, index=knn.index)
        for number in MIN_KNNS:
            points.append(
                (label, {"min_knns": number}, walking.changed(**settings, min_knns=number))
            )
    return points


def measure(case: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    corpus, threads = CASES[case], options.threads
    folder = options.data / "models" / options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if options.model in WITHOUT_LEADING_SPACE:
        never = Metaspace(prepend_scheme="never", split=False)
        tokenizer.backend_tokenizer.pre_tokenizer = never
    parts = splits(options.data, corpus)
    chosen_parts = {"train": upto(in_one_line(parts["train"]), options.characters)}
    for split in ("valid", "test"):
        documents = in_one_line(parts[split], options.document_characters)
        chosen_parts[split] = upto(documents, options.test_characters)
    texts = {
        split: tokenize(documents, tokenizer, end=False)
        for split, documents in chosen_parts.items()
    }
    if case == "fine-tuned":
        fine_tune(model, texts["train"], options.steps, threads)
    store = build_datastore(
        model,
        None,
        texts["train"],
        scratch / case,
        windows=WINDOWS,
        config=ExtractionConfig(threads=threads),
        progress=False,
    )
    index = index_store(store, index_config(store), threads=threads)
    number = max(1, len(store) // options.entries_per_cluster)
    config = ClusterConfig(clusters=number, iterations=ITERATIONS)
    clusters = cluster_store(store, config, threads=threads, quiet=True)

    settings: dict[str, Any] = {"threads": threads, "progress": False}
    searched = KnnMemory(store, index=index, recompute=True)
    chosen = tune(model, texts["valid"], WINDOWS, searched, **settings)
    knn = searched.changed(chosen.best.k, chosen.best.temperature)
    base = evaluate(model, texts["test"], WINDOWS, **settings)
    points = []
    for method, setting, memory in memories(knn, clusters):
        if method not in options.methods:
            continue
        row = evaluate(
            model,
            texts["test"],
            WINDOWS,
            memory=memory,
            merge=chosen.merge,
            skip_above=setting.get("skip_above"),
            **settings,
        )
        points.append(point(method, setting, row, base))
        print(f"{case}: {method} {setting} {row.perplexity:.3f} saved {row.saved:.2f}", flush=True)
    return {
        "case": case,
        "corpus": corpus,
        "entries": len(store),
        "clusters": len(clusters),
        "index": index.describe(),
        "chosen": chosen.best.to_dict(),
        "at_edge": chosen.at_edge,
        "base": {"perplexity": base.perplexity, "protocol": base.describe()},
        "points": points,
    }


def point(method: str, setting: dict[str, Any], row: Evaluation, base: Evaluation) -> dict:
    """One point of a curve as plain JSON values."""
    return {
        "method": method,
        **setting,
        "saved": row.saved,
        "perplexity": row.perplexity,
        "against_base": row.compare(base).describe(),
        "memory_stats": row.memory_stats,
        "memory_seconds": row.seconds.memory,
        "tokens_per_second": row.tokens_per_second,
        "protocol": row.describe(),
    }


def table(cases: list[dict[str, Any]]) -> str:
    """The paper's tables: nothing saved, and about half (the measured point that is nearest)."""
    lines = ["| case | base | method | none saved | about half saved |", "|---|---|---|---|---|"]
    for case in cases:
        for method in METHODS:
            points = [point for point in case["points"] if point["method"] == method]
            if not points:
                continue
            none, half = (
                min(points, key=lambda point: abs(point["saved"] - wanted)) for wanted in (0, 0.5)
            )
            lines.append(
                f"| {case['case']} | {case['base']['perplexity']:.2f} | {method} "
                f"| {none['perplexity']:.2f} ({none['saved']:.2f}) "
                f"| {half['perplexity']:.2f} ({half['saved']:.2f}) |"
            )
    return "\n".join(lines)


def draw(cases: list[dict[str, Any]], path: Path):
    """Perplexity against the fraction of saved searches, one panel per case."""
    figures = require("matplotlib.figure", extra="plot", purpose="draw the curves")
    figure = figures.Figure(figsize=(4.2 * len(cases), 3.6), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for method, marker in zip(METHODS, "sv^o", strict=True):
            points = sorted(
                (point["saved"], point["perplexity"])
                for point in case["points"]
                if point["method"] == method
            )
            if points and method in (KNN, UNSURE):  # nothing is left to search: the model alone
                points.append((1.0, case["base"]["perplexity"]))
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=method)
        axes.set(title=case["case"], xlabel="saved searches", ylabel="perplexity", xlim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_picture(
        figure,
        path,
        "Perplexity against the fraction of saved searches",
        "Three cases: in the model's domain, far from it, and there after fine-tuning. In each, "
        "skipping at random loses most, RetoMaton with clusters least.",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpora and models")
    parser.add_argument("--model", default="tinystories-656k")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--characters", type=int, default=1_000_000, help="of training text")
    parser.add_argument("--test-characters", type=int, default=50_000, help="and of tuning text")
    parser.add_argument("--document-characters", type=int, default=4_000, help="read of each")
    parser.add_argument("--entries-per-cluster", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--plot", choices=("png", "svg"), default="svg")
    parser.add_argument("--name", default="retomaton", help="of the files under results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the results say what was built
        cases = [measure(case, options, Path(scratch)) for case in options.cases]
    save(options.name, {"windows": WINDOWS.describe(), "steps": options.steps, "cases": cases})
    draw(cases, RESULTS / f"{options.name}.{options.plot}")
    print(table(cases))


if __name__ == "__main__":
    main()
