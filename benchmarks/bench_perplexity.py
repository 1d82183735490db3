"""Base model against kNN-LM on real text: in the model's own domain and far from it.

Two small pretrained models, three corpora: stories like the ones the models were trained on, the
United States Code (law) and Python's enhancement proposals (technical prose). For every pair a
datastore is built from training documents, lam, temperature and k are chosen on development
documents, and perplexity is reported on test documents with document-level intervals: base, exact
search, IVF-PQ. Protocol: sliding windows within documents, printed with the results.

The stories come from the corpus the models were trained on, so their base perplexity may be
in-sample.
"""

import argparse
import json
import lzma
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import save
from memlm.data.documents import Document, read_documents
from memlm.data.tokens import tokenize
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.tune import tune
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.memory.knn import KnnMemory
from memlm.methods.demo import index_config
from memlm.methods.knn_lm import index_store

MODELS = ("stories260K", "tinystories-656k")
CORPORA = ("tinystories", "uscode", "peps")
WINDOWS = SlidingWindows(length=256, stride=128)


def splits(data: Path, corpus: str) -> dict[str, list[Document]]:
    if corpus == "tinystories":
        path = data / "tinystories" / "tinystories_sample.txt.xz"
        stories = list(read_documents(path, separator="<|endoftext|>"))[:-1]  # the last is cut
        return {"train": stories[:-200], "valid": stories[-200:-100], "test": stories[-100:]}
    parts: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    with lzma.open(data / corpus / f"{corpus}.jsonl.xz", "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            parts[record["split"]].append(Document(record["id"], record["text"]))
    return parts


def upto(documents: list[Document], characters: int) -> list[Document]:
    """Documents in order until they hold so many characters; the last one may be cut."""
    chosen, room = [], characters
    for document in documents:
        if room <= 0:
            break
        chosen.append(Document(document.name, document.text[:room]))
        room -= len(document.text)
    return chosen


def measure(data: Path, name: str, corpus: str, options: argparse.Namespace) -> dict:
    folder = data / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"train": options.characters, "valid": 30_000, "test": 60_000}
    texts = {
        split: tokenize(upto(documents, sizes[split]), tokenizer)
        for split, documents in splits(data, corpus).items()
    }
    settings = {"threads": options.threads, "progress": False}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        store = build_datastore(
            model,
            None,
            texts["train"],
            Path(place) / "store",
            windows=WINDOWS,
            config=ExtractionConfig(threads=options.threads),
            progress=False,
        )
        exact = KnnMemory(store, index="exact")
        chosen = tune(model, texts["valid"], WINDOWS, exact, **settings)
        best = exact.changed(chosen.best.k, chosen.best.temperature)
        approximate = index_store(store, index_config(store), threads=options.threads)
        quantised = KnnMemory(store, k=best.k, temperature=best.temperature, index=approximate)
        rows = {"base": evaluate(model, texts["test"], WINDOWS, **settings)}
        for label, memory in (("exact", best), ("ivfpq", quantised)):
            rows[label] = evaluate(
                model, texts["test"], WINDOWS, memory=memory, merge=chosen.merge, **settings
            )
        recall = approximate.describe()["recall"]
    return {
        "model": name,
        "corpus": corpus,
        "entries": len(store),
        "chosen": chosen.best.to_dict(),
        "at_edge": chosen.at_edge,
        "index": approximate.describe()["factory"],
        "recall": recall,
        "rows": {
            label: {
                **row.summary(),
                "protocol": row.describe(),
                "against_base": row.compare(rows["base"]).describe(),
            }
            for label, row in rows.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of corpora and models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--characters", type=int, default=600_000, help="of training text")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--corpora", nargs="+", default=list(CORPORA))
    options = parser.parse_args()
    cases = [
        measure(options.data, model, corpus, options)
        for corpus in options.corpora
        for model in options.models
    ]
    save("perplexity", {"windows": WINDOWS.describe(), "cases": cases})


if __name__ == "__main__":
    main()
