"""RETRO-fit of a small trained model: what neighbours from a relevant database are worth.

    python -m benchmarks.bench_retro_fit MODEL stories=STORIES.txt.xz law=LAW.jsonl.xz

For every text: its training documents are the database; the model learns to read neighbours on
them for ``--seconds``, its own weights frozen; then the held-out documents are scored with
retrieval on, off (the model as it was) and with the neighbours of other chunks. Training a new
encoder on a text also adapts the model to that text, which helps with any neighbours: the gap
between shuffled and off is adaptation, that between on and shuffled is what neighbours say.

Guards against leakage: neighbours are never of the own document; held-out documents that share more
than a fifth of their 8-token sequences with a training document are dropped; near duplicates (0.8
of a chunk's sequences) are not retrieved; and bits per byte are also given for the chunks that
share at most an eighth of their tokens in a row with a neighbour.
"""

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import save
from memlm.data.documents import Document, read_documents
from memlm.evaluation.leakage import leakage
from memlm.evaluation.retro import compare_retrieval, table
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from memlm.training.retro import RetroText, fitted_model, train_retro
from memlm.training.retro_config import RetroTrainConfig

NEAR, SHARED, GRAM = 0.8, 0.2, 8
HELD_OUT = 20  # every twentieth document
CHUNK, CHUNKS = 32, 8
ALPHA = 0.125


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", help="name=file; a .txt is cut at <|endoftext|>")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--documents", type=int, default=2000, help="of a text, at most")
    parser.add_argument("--held-out", type=int, default=40, help="documents scored, at most")
    parser.add_argument("--layers", type=int, nargs="+", default=None)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="retro_fit", help="name of the result")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "model": Path(options.model).name,
        "protocol": __doc__.split("\n\n", 2)[2].strip(),
        "settings": {
            name: value
            for name, value in vars(options).items()
            if name not in ("model", "texts", "out")
        },
        "texts": {},
    }
    result["settings"] |= {"chunk_size": CHUNK, "k": 2, "sequence": CHUNK * CHUNKS}
    for one in options.texts:
        name, _, file = one.partition("=")
        result["texts"][name] = run(name, file, options)
    save(options.out, result)


def run(name: str, file: str, options: argparse.Namespace) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    training, held_out, dropped = split(documents(file)[: options.documents], options.held_out)
    print(f"{name}: {len(training)} documents, {len(held_out)} held out, {dropped} dropped")
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        chunks = ChunkConfig(chunk_size=CHUNK)
        database = build_chunks(training, tokenizer, f"{folder}/text", chunks, quiet=True)
        text = build_chunks(held_out, tokenizer, f"{folder}/test", chunks, quiet=True)
        bm25 = Bm25Retriever(database)
        tables = [
            build_neighbours(one, bm25, k=2, near_duplicates=NEAR, quiet=True)
            for one in (database, text)
        ]
        looked_up = time.perf_counter() - begun
        config = RetroTrainConfig(
            block_length=CHUNKS * CHUNK,
            batch_tokens=4 * CHUNKS * CHUNK,
            optimizer="muon",
            learning_rate=options.learning_rate,
            warmup_steps=20,
            max_seconds=options.seconds,
            cross_attention_layers=None if options.layers is None else tuple(options.layers),
            threads=options.threads,
            log_every=10,
        )
        base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        test = RetroDataset(text, tables[1], database, chunks_per_sequence=CHUNKS)
        before = compare_retrieval(fitted_model(base, config, CHUNK), test, modes=["off"])["off"]
        model = train_retro(
            RetroText(database, tables[0]),
            tokenizer,
            config,
            f"{folder}/run",
            model=fitted_model(base, config, CHUNK),
            quiet=True,
        )
        figures = compare_retrieval(model, test, quiet=True)
        # off is the base model, to the bit
        assert (figures["off"].chunk_nats == before.chunk_nats).all()
        rows = leakage(figures, test, alphas=(ALPHA, 1.0))
        curve = json.loads(Path(folder, "run", "training.json").read_text(encoding="utf-8"))
    print(table(figures), flush=True)
    new = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return {
        "documents": len(training),
        "held_out": len(held_out),
        "dropped_for_overlap": dropped,
        "chunks": len(database),
        "chunk_and_look_up_seconds": looked_up,
        "new_parameters": new,
        "base_parameters": base.num_parameters(),
        "layers": model.retro.cross_attention_layers,
        "gates": {layer: float(gate.detach().tanh()) for layer, gate in model.gates.items()},
        "steps": curve["steps"],
        "training_tokens": curve["tokens"],
        "training_tokens_per_second": curve["tokens_per_second"],
        "loss": [curve["curve"][0]["loss"], curve["curve"][-1]["loss"]],
        "retrieval": {mode: one.summary() for mode, one in figures.items()},
        "little_overlap": {"alpha": ALPHA, "share": rows[0].share, **rows[0].bits_per_byte},
    }


def documents(file: str) -> list[Document]:
    """Those of a .jsonl file (also .xz), or of a text file cut at <|endoftext|>."""
    if ".jsonl" in file:
        return list(read_documents(file))
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read()
    parts = [part.strip() for part in text.split("<|endoftext|>")]
    return [Document(f"{number}", part) for number, part in enumerate(parts) if part]


def split(all_: list[Document], most: int) -> tuple[list[Document], list[Document], int]:
    """Every so-manieth document is held out, if it is not nearly in the rest."""
    training = [one for number, one in enumerate(all_) if number % HELD_OUT]
    seen = {gram for one in training for gram in grams(one)}
    chosen = [one for number, one in enumerate(all_) if number % HELD_OUT == 0]
    kept = [one for one in chosen if not near(grams(one), seen)]
    return training, kept[:most], len(chosen) - len(kept)


def grams(document: Document) -> set[int]:
    words = document.text.lower().split()
    return {hash(tuple(words[start : start + GRAM])) for start in range(len(words) - GRAM + 1)}


def near(own: set[int], seen: set[int]) -> bool:
    return bool(own) and len(own & seen) > SHARED * len(own)


if __name__ == "__main__":
    main()
