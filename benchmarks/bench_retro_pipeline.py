"""RETRO's data: from a folder of text to a table of neighbours, against the published package.

    python -m benchmarks.bench_retro_pipeline --data DATA --package PYTHON

The same documents of DATA/wikinews, WordPiece of DATA/tokenizers, chunks of 64 tokens, one encoder
on both sides (BERT's shape with LAYERS layers, random weights; width 768, the only one that the
package's call takes), squared distance, two neighbours of each chunk that are not of its document.
The package downloads its tokenizer and its BERT by name; here both are set from outside. Each side
and stage runs in a process of its own with one thread, in turn; the lower of ``--rounds`` counts.
Seconds are those of the processor, so that other work on the machine does not count.

    chunk        texts to chunks of tokens on disk
    neighbours   chunks embedded, indexed and looked up

The ceiling of the second stage is the arithmetic of the encoder over the tokens that chunks have
(padding and the search left out), at the speed of a large matrix product here.
"""

import argparse
import json
import lzma
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHUNK, K, LAYERS, WIDTH, BATCH = 64, 2, 1, 768, 16
STAGES = ("chunk", "neighbours")


def flops(tokens: int, chunks: int) -> float:
    """Multiplications and additions of the encoder over all chunks, [CLS] included."""
    read = tokens + chunks
    return LAYERS * read * (24 * WIDTH**2 + 4 * CHUNK * WIDTH)


def arithmetic(size: int = 1536) -> float:
    """Float32 operations of a large matrix product per second of one processor."""
    import torch

    torch.set_num_threads(1)
    a, b, spent = torch.randn(size, size), torch.randn(size, size), []
    for _ in range(5):
        begun = time.process_time()
        a @ b
        spent.append(time.process_time() - begun)
    return 2 * size**3 / min(spent)


def encoder():
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=30522, num_hidden_layers=LAYERS)
    return BertModel(config, add_pooling_layer=False).eval()


def tokenizer(folder: Path):
    from transformers import BertTokenizerFast

    return BertTokenizerFast(str(folder / "vocab.txt"))


def ours(stage: str, folder: Path) -> dict:
    from memlm.data.documents import read_documents
    from memlm.methods.retro import make_retriever
    from memlm.models.text_encoder import HuggingFaceEncoder
    from memlm.retrieval.build import build_chunks
    from memlm.retrieval.chunks import ChunkConfig, ChunkDatabase
    from memlm.retrieval.embeddings import embed_chunks
    from memlm.retrieval.index import index_chunks
    from memlm.retrieval.neighbours import build_neighbours

    path, words = folder / "ours", tokenizer(folder)
    read = HuggingFaceEncoder(encoder(), prefix=(words.cls_token_id,), skip_first=True)
    begun = time.process_time()
    if stage == "chunk":
        texts, config = read_documents(folder / "text"), ChunkConfig(CHUNK)
        build_chunks(texts, words, path, config, rebuild=True, quiet=True)
    else:
        database = ChunkDatabase.open(path)
        embed_chunks(database, read, batch_size=BATCH, rebuild=True, quiet=True)
        index_chunks(database, rebuild=True, quiet=True)
        found = make_retriever(database, "dense", read)
        build_neighbours(database, found, k=K, rebuild=True, quiet=True)
    spent = time.process_time() - begun
    database = ChunkDatabase.open(path)
    return {"seconds": spent, "chunks": len(database), "tokens": int(database.offsets[-1])}


def package(stage: str, folder: Path) -> dict:
    import os

    import retro_pytorch.retrieval as there  # type: ignore[import-not-found]

    words = tokenizer(folder)

    class Tokenizer:
        """The name that the package calls, which transformers has no more."""

        def batch_encode_plus(self, texts, **settings):
            return words(texts, **settings)

    there.TOKENIZER, there.MODEL = Tokenizer(), encoder()
    os.chdir(folder)  # it leaves its files where it runs
    names = [f"{name}.dat" for name in ("chunks", "seqs", "documents")]
    known = folder / "stats.json"
    begun = time.process_time()
    if stage == "chunk":
        stats = there.text_folder_to_chunks_(
            folder="text",
            chunks_memmap_path=names[0],
            seqs_memmap_path=names[1],
            doc_ids_memmap_path=names[2],
            chunk_size=CHUNK,
            seq_len=2048,
            max_chunks=100_000,
            max_seqs=10_000,
        )
        known.write_text(json.dumps(stats))
    else:
        stats = json.loads(known.read_text())
        there.chunks_to_precalculated_knn_(
            num_nearest_neighbors=K,
            num_chunks=stats["chunks"],
            chunk_size=CHUNK,
            chunk_memmap_path=names[0],
            doc_ids_memmap_path=names[2],
            num_extra_neighbors=100,
            force_reprocess=True,
        )
    return {"seconds": time.process_time() - begun, "chunks": stats["chunks"]}


def worker(python: str, which: str, stage: str, folder: Path) -> dict:
    command = [python, __file__, "--worker", which, stage, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def prepare(data: Path, folder: Path, documents: int) -> None:
    """The texts, one file each, and the table of words."""
    (folder / "text").mkdir()
    with lzma.open(data / "wikinews" / "wikinews.jsonl.xz", "rt", encoding="utf-8") as lines:
        for number, line in zip(range(documents), lines, strict=False):
            (folder / "text" / f"{number:06d}.txt").write_text(json.loads(line)["text"])
    words = next((data / "tokenizers").rglob("*vocab*.txt"))
    (folder / "vocab.txt").write_text(words.read_text(encoding="utf-8"), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--package", help="a Python that can import retro_pytorch")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import torch

        torch.set_num_threads(1)
        which, stage, folder = options.worker
        print(json.dumps((ours if which == "ours" else package)(stage, Path(folder))))
        return
    from benchmarks.common import save

    sides = {"ours": sys.executable}
    if options.package:
        sides["package"] = options.package
    best: dict = {which: {} for which in sides}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.data, Path(folder), options.documents)
        for _ in range(options.rounds):
            for stage in STAGES:
                for which, python in sides.items():
                    run = worker(python, which, stage, Path(folder))
                    before = best[which].get(stage, run)
                    best[which][stage] = min(run, before, key=lambda one: one["seconds"])
    rates = {
        which: {stage: run["chunks"] / run["seconds"] for stage, run in stages.items()}
        for which, stages in best.items()
    }
    mine = best["ours"]["neighbours"]
    ceiling = flops(mine["tokens"], mine["chunks"]) / arithmetic()
    result = {
        "documents": options.documents,
        "stages": best,
        "chunks_per_second": rates,
        "percent_of_ceiling": 100 * ceiling / mine["seconds"],
    }
    if options.package:
        result["ratio"] = {s: rates["ours"][s] / rates["package"][s] for s in STAGES}
    save("retro_pipeline", result)


if __name__ == "__main__":
    main()
