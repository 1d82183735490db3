"""RETRO (Borgeaud et al. 2022): text in chunks, neighbours of every chunk, a model that reads them.

    1. `memlm.retrieval.build`        documents -> chunks of m tokens                      (2.1)
    2. `memlm.retrieval.embeddings`   a frozen encoder embeds every chunk                  (2.2)
    3. `memlm.retrieval.index`        an index over the embeddings                         (2.2)
    4. `memlm.retrieval.neighbours`   k neighbours of every chunk, not of its own document (2.2)
    5. `memlm.retrieval.dataset`      sequences of chunks with neighbours and continuations
    6. `memlm.models.retro`           encoder, decoder, chunked cross-attention            (2.3-2.5)
    7. `memlm.training.retro`         AdamW on the common training loop                    (C)

Step 6 may also be a trained language model that learns to read neighbours while its own weights
stay: `memlm.models.retro.fit` (4.2). Steps 2 and 3 are for dense retrieval; BM25 needs neither.
`retro_database` is steps 1 to 4 in one call.
"""

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import InputError, first_line
from memlm.data.documents import read_documents
from memlm.models.running import device_named
from memlm.models.text_encoder import HuggingFaceEncoder, SentenceEncoder
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig, ChunkDatabase
from memlm.retrieval.embeddings import DIRECTORY, ChunkEncoder, Embeddings, embed_chunks
from memlm.retrieval.index import index_chunks, open_index
from memlm.retrieval.neighbours import NeighbourTable, build_neighbours
from memlm.retrieval.retrievers import (
    Bm25Retriever,
    DenseRetriever,
    RerankedRetriever,
    Retriever,
)

Kind = Literal["bm25", "dense", "reranked"]


def retro_database(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: str | Path,
    *,
    chunk_size: int = 64,
    k: int = 2,
    retriever: Kind = "bm25",
    encoder: ChunkEncoder | None = None,
    rebuild: bool = False,
    quiet: bool = False,
) -> tuple[ChunkDatabase, NeighbourTable]:
    """From a folder of text to chunks with neighbours; interrupted, it continues.

    Args:
        source: what ``memlm.read_documents`` reads: a path, a data set, texts.
        tokenizer: of the model.
        out: directory of the database.
        chunk_size: tokens per chunk.
        k: neighbours of each chunk.
        retriever: "bm25", "dense" or "reranked".
        encoder: of chunks, for the latter two.
        rebuild: begin anew.
        quiet: show no progress bars.

    Raises:
        InputError: if a setting or the text is not usable.
        FingerprintError: if something else was built in the directory.
        StoreError: if the disk refuses.
    """
    documents = read_documents(source)
    config = ChunkConfig(chunk_size=chunk_size)
    database = build_chunks(documents, tokenizer, out, config, rebuild=rebuild, quiet=quiet)
    if encoder is not None and retriever != "bm25":
        embed_chunks(database, encoder, quiet=quiet)
        index_chunks(database, quiet=quiet)
    found = make_retriever(database, retriever, encoder)
    return database, build_neighbours(database, found, k=k, quiet=quiet)


def make_retriever(
    database: ChunkDatabase, kind: Kind = "bm25", encoder: ChunkEncoder | None = None
) -> Retriever:
    """A retriever of what is on disk; a missing index is exact search.

    Raises:
        InputError: if ``kind`` is unknown or a dense one has no encoder.
        StoreError: if a dense one has no embeddings, or some are missing.
        FingerprintError: if they were made by another encoder, or the index of other embeddings.
    """
    if kind == "bm25":
        return Bm25Retriever(database)
    check(
        kind in ("dense", "reranked"),
        f"a retriever must be 'bm25', 'dense' or 'reranked', got {kind!r}",
    )
    if encoder is None:
        raise InputError(f"a {kind} retriever needs the encoder of its embeddings, got none")
    embeddings = Embeddings.open(database.path / DIRECTORY, database)
    dense = DenseRetriever(database, encoder, embeddings, open_index(database, embeddings))
    return dense if kind == "dense" else RerankedRetriever(dense, Bm25Retriever(database))


def load_encoder(
    name: str,
    source_tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: Literal["mean", "cls", "sentence"] = "mean",
    device: str = "auto",
) -> ChunkEncoder:
    """A text encoder by its folder or Hub id.

    Args:
        name: of the encoder.
        source_tokenizer: of the chunks.
        pooling: "mean" or "cls" over the model's states, or "sentence": sentence-transformers.
        device: where it runs; "auto": the GPU if there is one.

    Raises:
        InputError: if it cannot be loaded, or the device is not there.
        MissingExtraError: for "sentence" without sentence-transformers.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    device = device_named(device)
    try:
        if pooling == "sentence":
            return SentenceEncoder(name, source_tokenizer, device=device)
        model = _without_pooler(AutoModel.from_pretrained, name, dtype=torch.float32).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"the encoder must be a folder or Hub id of a text encoder, got {name!r}: "
            f"{first_line(error)}"
        ) from error
    return HuggingFaceEncoder(model.eval(), tokenizer, source_tokenizer, pooling=pooling)


def _without_pooler(load: Any, name: str, **settings: Any) -> Any:
    """Load a model without the layer behind [CLS]: not used, and random where a file lacks it."""
    try:
        return load(name, add_pooling_layer=False, **settings)
    except TypeError:  # a family that has none
        return load(name, **settings)
