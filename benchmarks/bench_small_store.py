"""Stores of codes against the store of whole keys: bytes, probability mass, perplexity.

One small pretrained model reads training documents once with whole keys and once for every size of
code, with a codec of its own each time; lam, temperature and k are chosen on development documents
with exact search. Of every store of codes it is measured, without any re-scoring,

    mass          sum of p_j over the neighbours j that it finds, with p the softmax over the k
                  nearest of the exact search: recall, weighted by what a neighbour counts
    perplexity    on test documents, at the settings of the exact search, with document-level
                  intervals of the ratio to it

Queries of the mass are hidden states of the test documents. Protocol: sliding windows within
documents, printed with the results.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.bench_perplexity import WINDOWS, splits, upto
from benchmarks.common import save
from memlm.data.tokens import tokenize
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.tune import tune
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.index.plan import IndexConfig
from memlm.memory.knn import KnnMemory
from memlm.store.reader import Datastore

QUERIES = 500
PAGE = Path(__file__).parents[1] / "docs" / "datastore.md"
BEGIN, END = "<!-- small store: begin -->", "<!-- small store: end -->"


def bytes_of(store: Datastore) -> int:
    return sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())


def mass(exact: KnnMemory, small: KnnMemory, queries: torch.Tensor) -> tuple[float, float]:
    """Mean recall of the exact neighbours, and the same weighted by their probabilities."""
    truth, _ = exact.read(queries)
    found, _ = small.read(queries)
    weights = truth.scores.masked_fill(~truth.valid, -torch.inf).softmax(1)
    hits = torch.stack(
        [
            torch.isin(wanted, got[valid])
            for wanted, got, valid in zip(truth.ids, found.ids, found.valid, strict=True)
        ]
    )
    return float(hits.float().mean()), float((weights * hits).sum(1).mean())


def write_table(value: dict) -> None:
    """Put the result into the documentation, between its two marks."""
    rows = [
        ["store", "nprobe", "bytes", "smaller by", "recall", "mass", "perplexity"],
        ["---", *["---:"] * 6],
        ["model alone", *["-"] * 5, f"{value['base_perplexity']:.2f}"],
        ["whole keys", "exact", f"{value['full_bytes']:,}", "1", "1", "1"],
    ]
    rows[-1].append(f"{value['exact_perplexity']:.2f}")
    for case in value["cases"]:
        rows.append(
            [
                f"{case['code_size']} bytes a key ({case['type']})",
                str(case["nprobe"]),
                f"{case['bytes']:,}",
                f"{case['smaller_by']:.1f}",
                f"{case['recall']:.3f}",
                f"{case['mass']:.3f}",
                f"{case['perplexity']:.2f}",
            ]
        )
    chosen = value["chosen"]
    about = (
        f"{value['entries']:,} entries of {value['dim']} dimensions, {value['lists']} lists, "
        f"{value['queries']} queries for recall and mass; k = {chosen['k']:,}, lam = "
        f"{chosen['lam']:g} and temperature {chosen['temperature']:.3g} chosen with exact search:"
    )
    lines = [about, "", *(f"| {' | '.join(row)} |" for row in rows)]
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    text = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpora and models")
    parser.add_argument("--model", default="stories260K")
    parser.add_argument("--corpus", default="uscode")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--characters", type=int, default=600_000, help="of training text")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--lists", type=int, default=128)
    parser.add_argument("--nprobe", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rotated", action="store_true", help="also codes of rotated keys (OPQ)")
    options = parser.parse_args()
    folder = options.data / "models" / options.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    characters = {"train": options.characters, "valid": 10_000, "test": 20_000}
    texts = {
        split: tokenize(upto(documents, characters[split]), tokenizer)
        for split, documents in splits(options.data, options.corpus).items()
    }
    settings = {"threads": options.threads, "progress": False}
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)

        def build(name: str, split: str, codes: IndexConfig | None = None) -> Datastore:
            return build_datastore(
                model,
                None,
                texts[split],
                Path(place) / name,
                windows=WINDOWS,
                config=ExtractionConfig(threads=options.threads),
                codes=codes,
                progress=False,
            )

        full = build("full", "train")
        exact = KnnMemory(full, index="exact")
        chosen = tune(model, texts["valid"], WINDOWS, exact, **settings)
        best = exact.changed(chosen.best.k, chosen.best.temperature)
        held = build("held", "test")
        entries = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:QUERIES]
        queries = held.gather(entries).float()
        base = evaluate(model, texts["test"], WINDOWS, **settings)
        whole = evaluate(model, texts["test"], WINDOWS, memory=best, merge=chosen.merge, **settings)
        cases = []
        for kind in ("ivfpq", "opq") if options.rotated else ("ivfpq",):
            for size in options.sizes:
                codes = IndexConfig(
                    type=kind, lists=options.lists, code_size=size, recall_queries=0
                )
                begun = time.perf_counter()
                small = build(f"{kind}-{size}", "train", codes)
                built = time.perf_counter() - begun
                for nprobe in options.nprobe:
                    memory = KnnMemory(small, k=best.k, temperature=best.temperature)
                    memory.index._lists.nprobe = nprobe
                    result = evaluate(
                        model, texts["test"], WINDOWS, memory=memory, merge=chosen.merge, **settings
                    )
                    recall, weighted = mass(best, memory, queries)
                    cases.append(
                        {
                            "type": kind,
                            "code_size": size,
                            "nprobe": nprobe,
                            "build_seconds": built,
                            "bytes": bytes_of(small),
                            "smaller_by": bytes_of(full) / bytes_of(small),
                            "recall": recall,
                            "mass": weighted,
                            "perplexity": result.perplexity,
                            "loss": result.perplexity - whole.perplexity,
                            "against_exact": result.compare(whole).describe(),
                        }
                    )
        value = {
            "model": options.model,
            "corpus": options.corpus,
            "entries": len(full),
            "dim": full.dim,
            "lists": options.lists,
            "queries": len(queries),
            "chosen": chosen.best.to_dict(),
            "full_bytes": bytes_of(full),
            "base_perplexity": base.perplexity,
            "exact_perplexity": whole.perplexity,
            "protocol": whole.describe(),
            "cases": cases,
        }
    save("small_store", value)
    write_table(value)


if __name__ == "__main__":
    main()
