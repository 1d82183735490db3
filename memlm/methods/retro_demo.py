"""RETRO on one page: a database, neighbours, a small model, and whether they help. No download.

Meant for the documentation that every Python carries, split by document. The training documents are
the database, as in the paper's first experiments; every chunk of training and held-out text is
looked up in it, without its own document. A small RETRO model learns for two minutes, and is then
measured on held-out documents with retrieval on, off, and with the neighbours of other chunks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from memlm.core.files import write_json
from memlm.core.threads import torch_threads
from memlm.data.documents import Document
from memlm.evaluation.leakage import LeakageRow, leakage
from memlm.evaluation.retro import RetroEvaluation, compare_retrieval
from memlm.methods.demo import sample
from memlm.methods.retro import retro_database
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig, ChunkDatabase
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.inspect import inspect_chunk, write_html
from memlm.retrieval.lookup import ChunkLookup
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from memlm.training.retro import RetroText, train_retro
from memlm.training.retro_config import RetroTrainConfig
from memlm.training.tokenizer import train_tokenizer

VOCABULARY = 2048
CHUNK_SIZE = 32
CHUNKS_PER_SEQUENCE = 8
ROWS = 4
TEST_CHARACTERS = 100_000
SHOWN = 20  # chunks on the page of neighbours
PROMPT = "class Thread\n\nA class that represents a thread of control."

Say = Callable[[str], None]


class RetroDemo(NamedTuple):
    """What came out.

    Attributes:
        model: trained, in evaluation mode.
        database: the chunks it retrieves from.
        evaluations: by mode, on held-out text.
        overlap: bits per byte by overlap of chunk and neighbours.
        completion: of the prompt, with retrieval.
    """

    model: RetroForCausalLM
    database: ChunkDatabase
    evaluations: dict[str, RetroEvaluation]
    overlap: list[LeakageRow]
    completion: str


def demo(
    out: str | Path,
    train_documents: list[Document],
    test_documents: list[Document],
    *,
    seconds: float = 120.0,
    prompt: str = PROMPT,
    threads: int | None = None,
    say: Say = lambda line: None,
) -> RetroDemo:
    """The whole way, in ``out``; what is there from an earlier call is used again.

    Args:
        out: directory of database, tables, model and results.
        train_documents: the database and training text.
        test_documents: held-out text, of which a sample is scored.
        seconds: of training.
        prompt: to continue.
        threads: CPU threads; None: as they are.
        say: told what happens, line by line.

    Raises:
        InputError: if there is too little text.
    """
    out = Path(out)
    test_documents = sample(test_documents, TEST_CHARACTERS)
    tokenizer = train_tokenizer(train_documents, VOCABULARY, exact=False)
    begun = time.perf_counter()
    database, table = retro_database(
        train_documents, tokenizer, out / "database", chunk_size=CHUNK_SIZE, k=2
    )
    bm25 = Bm25Retriever(database)
    held_out = build_chunks(test_documents, tokenizer, out / "test", ChunkConfig(CHUNK_SIZE))
    found = build_neighbours(held_out, bm25, k=2)
    say(
        f"{len(database):,} chunks of {CHUNK_SIZE} tokens and {len(held_out):,} held-out ones "
        f"looked up by BM25 in {time.perf_counter() - begun:.0f} s"
    )
    test = RetroDataset(held_out, found, database, chunks_per_sequence=CHUNKS_PER_SEQUENCE)
    config = RetroTrainConfig(
        block_length=CHUNKS_PER_SEQUENCE * CHUNK_SIZE,
        batch_tokens=ROWS * CHUNKS_PER_SEQUENCE * CHUNK_SIZE,
        optimizer="muon",
        learning_rate=3e-3,
        warmup_steps=20,
        cross_attention_layers=(2, 4),
        max_seconds=seconds,
        threads=threads,
    )
    say(f"training for {seconds:.0f} s")
    model = train_retro(RetroText(database, table), tokenizer, config, out / "model", resume=True)
    say(f"trained {model.num_parameters() / 1e6:.1f} M parameters")

    with torch_threads(threads):
        evaluations = compare_retrieval(model, test)
        overlap = leakage(evaluations, test, alphas=(0.125, 0.25, 0.5, 1.0))
        shown = range(min(SHOWN, len(held_out)))
        pages = [inspect_chunk(held_out, found, database, tokenizer, chunk) for chunk in shown]
        write_html(pages, out / "neighbours.html")
        completion = _complete(model, tokenizer, ChunkLookup(bm25, k=2), prompt)
    write_json(
        out / "results.json",
        {
            "retrieval": {name: one.summary() for name, one in evaluations.items()},
            "overlap": [
                {"alpha": row.alpha, "share": row.share, **row.bits_per_byte}
                for row in overlap
                if row.share
            ],
            "prompt": prompt,
            "completion": completion,
        },
    )
    return RetroDemo(model, database, evaluations, overlap, completion)


def _complete(
    model: RetroForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    lookup: ChunkLookup,
    prompt: str,
) -> str:
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        tokens = model.generate(
            ids, retriever=lookup, align="right", max_new_tokens=2 * CHUNK_SIZE, do_sample=False
        )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))
