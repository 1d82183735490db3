"""Everything in memlm that builds something on disk, as one table for the tests of faults.

A builder makes or continues what is at a path, from inputs that lie elsewhere. What it has made is
read into plain values, or refused.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch

import memlm.index.build
import memlm.index.cluster
from memlm.core.errors import StoreError
from memlm.data.documents import Document
from memlm.data.lexical import read_order, write_order
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import SlidingWindows
from memlm.extract.build import build_datastore
from memlm.extract.config import ExtractionConfig
from memlm.importers.datastore import import_datastore
from memlm.index.build import build_index, extend_index, load_index
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.index.keys import TensorKeys
from memlm.index.partition import Clusters
from memlm.index.plan import IndexConfig
from memlm.memory.knn import KnnMemory
from memlm.memory.long import LongMemory
from memlm.memory.saved_state import load_state, save_state
from memlm.methods.pruning import prune_store
from memlm.retrieval.build import append_documents, build_chunks
from memlm.retrieval.chunks import ChunkConfig, ChunkDatabase
from memlm.retrieval.embeddings import Embeddings, embed_chunks
from memlm.retrieval.index import index_chunks
from memlm.retrieval.neighbours import NeighbourTable, build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from memlm.retrieval.verify import verify_embeddings, verify_neighbours
from memlm.store.arrays import save_arrays
from memlm.store.deleted import delete_documents
from memlm.store.manifest import Identity, PlannedRange, StoreInfo
from memlm.store.reader import Datastore
from memlm.store.rewrite import compact_store, join_stores
from memlm.store.verify import verify
from memlm.store.writer import StoreWriter
from memlm.testing.tiny import tiny_model
from tests.faults.text import WORDS, CountingEncoder, word_tokenizer

DIM = 8
KEYS = 480
ROWS = (3, 5, 2)
INDEX = IndexConfig(factory="IVF4,PQ2x4", nprobe=4, recall_k=5, recall_queries=10)
QUERIES = torch.randn(3, DIM, generator=torch.Generator().manual_seed(9))
LONG = LongMemory(size=6, temperature=2.0)
EXTRACTION = ExtractionConfig(shard_entries=20, batch_tokens=64, threads=1)


class Builder(NamedTuple):
    """Something that builds.

    Attributes:
        build: makes or continues what is at the path (its first argument) from the inputs.
        read: what is there as plain values; raises a MemlmError if it cannot be used.
        begin: what is at the path before, if there has to be something.
        alone: whether only one process may build at a time.
        exact: whether the same bytes come out, not only the same values.
    """

    build: Callable[[Path, Path], Any]
    read: Callable[[Path, Path], Any]
    begin: Callable[[Path, Path], Any] = lambda path, inputs: None
    alone: bool = False
    exact: bool = True


# --- inputs


def keys_of(count: int = KEYS, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, DIM, generator=draw) * 4
    return centres[torch.arange(count) % 8] + torch.randn(count, DIM, generator=draw)


def documents(count: int = 6, first: int = 0) -> list[Document]:
    words = WORDS.split()
    draw = np.random.default_rng(first)
    return [
        Document(f"doc-{number}", " ".join(draw.choice(words, int(draw.integers(8, 40)))))
        for number in range(first, first + count)
    ]


def small_store(path: Path, seed: int, rows: int = 20) -> Datastore:
    half = rows // 2
    return save_arrays(
        path,
        keys_of(rows, seed),
        torch.arange(rows) % 7,
        documents=torch.arange(rows) // half,
        positions=torch.arange(rows) % half,
        dtype="float16",
        model_hash="m",
        shard_rows=8,
    )


def make_inputs(folder: Path) -> Path:
    """What the builders build from."""
    store = small_store(folder / "store", 1)
    small_store(folder / "other", 2)
    delete_documents(small_store(folder / "deleted", 3), [0])
    keys = keys_of()
    keys.numpy().astype("<f4").tofile(folder / "raw_keys.npy")
    (np.arange(KEYS) % 50).astype("<i8").tofile(folder / "raw_vals.npy")
    flat = faiss.IndexFlatL2(DIM)
    flat.add(keys.numpy())  # pyright: ignore[reportCallIssue]
    faiss.write_index(flat, str(folder / "flat.index"))
    build_index(keys, INDEX, directory=folder / "index", quiet=True)
    build_chunks(documents(), word_tokenizer(), folder / "chunks", ChunkConfig(8), quiet=True)
    shutil.copytree(folder / "chunks", folder / "grown")
    grown = ChunkDatabase.open(folder / "grown")
    embed_chunks(grown, CountingEncoder(), quiet=True)
    index_chunks(grown, IndexConfig(type="flat", recall_queries=0), folder / "short", quiet=True)
    more_chunks(folder / "grown", folder)
    embed_chunks(ChunkDatabase.open(folder / "grown"), CountingEncoder(), quiet=True)
    assert len(store) == 20
    return folder


# --- the builders


def entries(number: int) -> tuple[torch.Tensor, ...]:
    rows = ROWS[number]
    places = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
    return keys_of(rows, number), torch.full((rows,), number), *places


def build_store(path: Path, inputs: Path) -> None:
    """What a worker does: claim what is pending until nothing is, then finalize."""
    identity = Identity("tiny", "m", "t", "final", DIM, "float16", corpus_hash="c", threads=1)
    ranges = [PlannedRange(number, number + 1, rows) for number, rows in enumerate(ROWS)]
    info = StoreInfo(documents=1, vocab_size=9)
    writer = StoreWriter.open(path, identity, ranges, info=info)
    while pending := writer.pending():
        for number in pending:
            with writer.claim(number) as mine:
                if mine:
                    writer.write(number, *entries(number))
    writer.finalize()


def read_store(path: Path, inputs: Path) -> Any:
    report = verify(path, "full", progress=False)
    if not report.ok:
        raise StoreError("; ".join(report.problems))
    store = Datastore.open(path)
    columns = [store.load_keys(), store.values, store.documents, store.positions, store.weights]
    dead = store.dead
    return [column.tolist() for column in [*columns, dead] if column is not None]


def extract(path: Path, inputs: Path) -> None:
    corpus = TokenCorpus.from_tokens(np.random.default_rng(1).integers(3, 50, 90))
    windows = SlidingWindows(length=16, stride=8)
    build_datastore(
        tiny_model("llama"), None, corpus, path, windows=windows, config=EXTRACTION, progress=False
    )


def extract_codes(path: Path, inputs: Path) -> None:
    corpus = TokenCorpus.from_tokens(np.random.default_rng(2).integers(3, 50, 240))
    windows = SlidingWindows(length=16, stride=8)
    codes = IndexConfig(factory="IVF2,PQ2x2", nprobe=2)
    config = ExtractionConfig(shard_entries=80, batch_tokens=256, threads=1)
    build_datastore(
        tiny_model("llama"),
        None,
        corpus,
        path,
        windows=windows,
        config=config,
        codes=codes,
        progress=False,
    )


def read_codes(path: Path, inputs: Path) -> Any:
    values = read_store(path, inputs)
    store = Datastore.open(path)
    queries = torch.randn(3, store.dim, generator=torch.Generator().manual_seed(9))
    found = KnnMemory(store, k=5).index.search(queries, 5)
    return [values, found.ids.tolist(), found.scores.tolist()]


def import_raw(path: Path, inputs: Path) -> None:
    import_datastore(
        inputs / "raw", path, dim=DIM, dtype="float32", index=inputs / "flat.index", shard_rows=200
    )


def read_import(path: Path, inputs: Path) -> Any:
    store = Datastore.open(path)
    found = load_index(path / "index", store).search(QUERIES, 5)
    return [read_store(path, inputs), found.ids.tolist(), found.scores.tolist()]


def index(path: Path, inputs: Path) -> None:
    kept = memlm.index.build._BLOCK_ROWS, memlm.index.build._SAVE_EVERY
    memlm.index.build._BLOCK_ROWS, memlm.index.build._SAVE_EVERY = 100, 200
    try:
        build_index(keys_of(), INDEX, directory=path, quiet=True)
    finally:
        memlm.index.build._BLOCK_ROWS, memlm.index.build._SAVE_EVERY = kept


def read_index(path: Path, inputs: Path) -> Any:
    found = load_index(path).search(QUERIES, 5)
    return [found.ids.tolist(), found.scores.tolist()]


def longer_index(path: Path, inputs: Path) -> None:
    more = TensorKeys(torch.cat([keys_of(), keys_of(40, 5)]))
    extend_index(inputs / "index", more, path, quiet=True)


def cluster(path: Path, inputs: Path) -> None:
    kept, memlm.index.cluster._BLOCK_ROWS = memlm.index.cluster._BLOCK_ROWS, 100
    try:
        config = ClusterConfig(clusters=8, iterations=3)
        cluster_store(TensorKeys(keys_of()), config, directory=path, quiet=True)
    finally:
        memlm.index.cluster._BLOCK_ROWS = kept


def read_clusters(path: Path, inputs: Path) -> Any:
    clusters = Clusters.load(path)
    return [clusters.offsets.tolist(), clusters.members.tolist(), clusters.cluster_of.tolist()]


def copy_of(name: str) -> Callable[[Path, Path], Any]:
    return lambda path, inputs: shutil.copytree(inputs / name, path)


def prune(path: Path, inputs: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_store(Datastore.open(inputs / "store"), path, neighbours=3, quiet=True)


def chunks(path: Path, inputs: Path) -> None:
    build_chunks(
        documents(), word_tokenizer(), path, ChunkConfig(8), segment_characters=150, quiet=True
    )


def more_chunks(path: Path, inputs: Path) -> None:
    append_documents(path, documents(3, first=6), word_tokenizer(), quiet=True)


def read_chunks(path: Path, inputs: Path) -> Any:
    database = ChunkDatabase.open(path)
    if problems := database.verify():
        raise StoreError("; ".join(problems))
    every = range(len(database))
    return [list(database.names), [database.chunk(number).tolist() for number in every]]


def embed(path: Path, inputs: Path) -> None:
    embed_chunks(ChunkDatabase.open(inputs / "chunks"), CountingEncoder(), path, quiet=True)


def read_embeddings(path: Path, inputs: Path) -> Any:
    if problems := verify_embeddings(path):
        raise StoreError("; ".join(problems))
    return Embeddings.open(path, ChunkDatabase.open(inputs / "chunks")).load_keys().tolist()


def neighbours(path: Path, inputs: Path) -> None:
    database = ChunkDatabase.open(inputs / "chunks")
    build_neighbours(database, Bm25Retriever(database), path, k=2, quiet=True)


def longer_chunk_index(path: Path, inputs: Path) -> None:
    index_chunks(ChunkDatabase.open(inputs / "grown"), path=path, quiet=True)


def read_chunk_index(path: Path, inputs: Path) -> Any:
    grown = ChunkDatabase.open(inputs / "grown")
    embeddings = Embeddings.open(grown.path / "embeddings", grown)
    found = load_index(path, embeddings).search(embeddings.load_keys()[::3], 4)
    return [found.ids.tolist(), found.scores.tolist()]


def read_neighbours(path: Path, inputs: Path) -> Any:
    if problems := verify_neighbours(path):
        raise StoreError("; ".join(problems))
    database = ChunkDatabase.open(inputs / "chunks")
    table = NeighbourTable.open(path, database, database)
    return [np.asarray(table.ids).tolist(), np.asarray(table.scores).tolist()]


def state(path: Path, inputs: Path) -> None:
    tokens, keys = torch.arange(1, 6)[None], keys_of(5)[None]
    begun = LONG.observe(tokens, keys, LONG.init_state(1))
    save_state(LONG, LONG.finish(begun), path / "state")


def read_state(path: Path, inputs: Path) -> Any:
    state = load_state(LONG, path / "state")
    return [state.keys.tolist(), state.tokens.tolist(), state.real.tolist()]


def folder(path: Path, inputs: Path) -> None:
    path.mkdir(parents=True)


BUILDERS: dict[str, Builder] = {
    "store": Builder(build_store, read_store),
    "extraction": Builder(extract, read_store),
    "extraction of codes": Builder(extract_codes, read_codes),
    "import": Builder(import_raw, read_import),
    "index": Builder(index, read_index, alone=True),
    "longer index": Builder(longer_index, read_index, alone=True),
    "clusters": Builder(cluster, read_clusters, alone=True),
    "delete": Builder(
        lambda path, inputs: delete_documents(Datastore.open(path), [1]),
        read_store,
        copy_of("store"),
    ),
    "compact": Builder(
        lambda path, inputs: compact_store(Datastore.open(inputs / "deleted"), path), read_store
    ),
    "join": Builder(
        lambda path, inputs: join_stores(
            [Datastore.open(inputs / name) for name in ("store", "other")], path
        ),
        read_store,
    ),
    "prune": Builder(prune, read_store),
    "chunks": Builder(chunks, read_chunks),
    "more chunks": Builder(more_chunks, read_chunks, copy_of("chunks")),
    "embeddings": Builder(embed, read_embeddings),
    "longer index of chunks": Builder(longer_chunk_index, read_chunk_index, copy_of("short")),
    "neighbours": Builder(neighbours, read_neighbours),
    "memory state": Builder(state, read_state, folder, exact=False),
    "order of blocks": Builder(
        lambda path, inputs: write_order(path / "order.json", np.arange(40)[::-1]),
        lambda path, inputs: read_order(path / "order.json", 40).tolist(),
        folder,
    ),
}
