"""retro-pytorch's training data become a chunk database with its table of neighbours.

The chunks keep their numbers, so the neighbours are taken as they are. What its files do not say is
lost: names of documents, sizes of texts (no bits per byte), and which encoder made the embeddings,
so these are not taken over; ``memlm retro embed`` makes them again.
"""

from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.data.tokens import TokenCorpus
from memlm.formats.retro_memmaps import read_retro_files
from memlm.retrieval.build import chunk_corpus
from memlm.retrieval.chunks import ChunkDatabase
from memlm.retrieval.neighbours import NeighbourTable, save_neighbours


def import_retro_data(
    directory: str | Path,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chunk_size: int | None = None,
    k: int | None = None,
    pad_id: int = 0,
    stem: str = "train",
) -> tuple[ChunkDatabase, NeighbourTable | None]:
    """Read what ``TrainingWrapper`` left and write it as a chunk database.

    Args:
        directory: with ``processed-stats.json`` and the ``.dat`` files.
        out: a new or empty directory.
        tokenizer: that made the tokens (there: of bert-base-cased).
        chunk_size: the one it was made with; None: inferred.
        k: neighbours per chunk; None: inferred.
        pad_id: what fills the last chunk of a document.
        stem: what the names of the files begin with.

    Returns:
        The database and its table, None where no neighbours had been computed.

    Raises:
        InputError: if the files do not fit together, or the directory is not empty.
        StoreError: if it cannot be written.
    """
    files = read_retro_files(directory, chunk_size=chunk_size, k=k, stem=stem)
    documents = np.asarray(files.documents)
    check(
        bool((np.diff(documents) >= 0).all()),
        f"the chunks of a document in {directory} must stand together, but its document numbers "
        "do not rise",
    )
    firsts = np.flatnonzero(np.r_[True, np.diff(documents) > 0])
    size = files.chunks.shape[1] - 1
    texts = []
    for first, end in zip(firsts, [*firsts[1:], len(documents)], strict=True):
        tokens = np.asarray(files.chunks[first:end, :-1]).reshape(-1)
        real = np.flatnonzero(tokens != pad_id)
        check(
            len(real) > 0 and real[-1] >= len(tokens) - size,
            f"chunk {end - 1} of {directory} must hold a token that is not padding ({pad_id}), but "
            "does not; is chunk_size or pad_id another?",
        )
        texts.append(tokens[: real[-1] + 1])
    offsets = np.cumsum([0, *map(len, texts)])
    corpus = TokenCorpus.from_tokens(np.concatenate(texts), offsets)
    database = chunk_corpus(corpus, tokenizer, out, chunk_size=size)
    if files.neighbours is None:
        return database, None
    ids = np.asarray(files.neighbours)
    return database, save_neighbours(database, database, ids, source="retro-pytorch")
