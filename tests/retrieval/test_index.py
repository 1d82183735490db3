import numpy as np
import pytest
import torch

from memlm.core.errors import FingerprintError, StoreError
from memlm.index.exact import ExactIndex
from memlm.index.plan import IndexConfig
from memlm.index.record import IndexRecord
from memlm.retrieval.build import append_documents
from memlm.retrieval.embeddings import Embeddings, embed_chunks
from memlm.retrieval.index import index_chunks, open_index
from memlm.retrieval.neighbours import build_neighbours
from memlm.retrieval.retrievers import Bm25Retriever
from memlm.retrieval.verify import verify_database
from tests.retrieval.texts import CountingEncoder, database, documents

FLAT = IndexConfig(type="flat", recall_queries=0)


def embedded(there, **settings):
    return embed_chunks(there, CountingEncoder(**settings), quiet=True)


@pytest.fixture
def there(tokenizer, tmp_path):
    return database(tmp_path / "database", tokenizer, documents(6))


def grown(there, tokenizer):
    """The database with three more documents, and its embeddings."""
    more = append_documents(there.path, documents(9), tokenizer, quiet=True)
    return more, embedded(more)


def found(index, embeddings):
    return index.search(embeddings.load_keys(), 5)


@pytest.mark.parametrize("config", [FLAT, IndexConfig(type="exact")], ids=["flat", "exact"])
def test_an_index_takes_in_what_was_appended(config, there, tokenizer):
    embedded(there)
    index_chunks(there, config, quiet=True)
    assert open_index(there, Embeddings.open(there.path / "embeddings", there)).metric == "l2"
    more, embeddings = grown(there, tokenizer)
    with pytest.raises(StoreError, match=f"made of {len(there)}; run memlm retro index"):
        open_index(more, embeddings)
    index = index_chunks(more, quiet=True)
    assert type(index).__name__ == ("FaissIndex" if config is FLAT else "ExactIndex")
    expected = found(ExactIndex(embeddings.load_keys()), embeddings)
    for one in (index, open_index(more, embeddings)):
        torch.testing.assert_close(found(one, embeddings).scores, expected.scores)
    names = {entry.name for entry in (there.path / "index").iterdir()}
    assert names <= {"index.json", "index.faiss"}


def test_what_was_trained_stays(there, tokenizer, monkeypatch):
    """No key is added twice, and clusters are those of the first keys."""
    embedded(there)
    config = IndexConfig(factory="IVF2,Flat", nprobe=2, recall_queries=0)
    before = index_chunks(there, config, quiet=True)
    more, embeddings = grown(there, tokenizer)
    monkeypatch.setattr("memlm.index.build.train_faiss", None)
    after = index_chunks(more, quiet=True)
    record = IndexRecord.read(there.path / "index")
    assert (record.train_size, record.entries) == (len(there), len(more))
    centroids = [one._index.quantizer.reconstruct_n(0, 2) for one in (before, after)]
    np.testing.assert_array_equal(*centroids)
    expected = found(ExactIndex(embeddings.load_keys()), embeddings).scores
    torch.testing.assert_close(found(after, embeddings).scores, expected)


def test_an_index_of_other_embeddings_is_refused(there, tokenizer):
    embedded(there)
    index_chunks(there, FLAT, quiet=True)
    embed_chunks(there, CountingEncoder("another"), rebuild=True, quiet=True)
    with pytest.raises(FingerprintError, match="built from store"):
        index_chunks(there, quiet=True)
    more, _ = grown_with(there, tokenizer, "another")
    with pytest.raises(FingerprintError, match="built from store"):
        index_chunks(more, quiet=True)
    assert len(index_chunks(more, FLAT, rebuild=True, quiet=True)) == len(more)


def grown_with(there, tokenizer, encoder):
    more = append_documents(there.path, documents(9), tokenizer, quiet=True)
    return more, embed_chunks(more, CountingEncoder(encoder), quiet=True)


@pytest.mark.parametrize(
    "name",
    [
        "segment-00000.safetensors",
        "names-00000.json",
        "embeddings/keys-00000.npy",
        "index/index.faiss",
        "neighbours/ids.npy",
        "neighbours/scores.npy",
    ],
)
def test_a_flipped_bit_is_found(name, there):
    assert verify_database(there) == []
    embedded(there)
    index_chunks(there, FLAT, quiet=True)
    build_neighbours(there, Bm25Retriever(there), quiet=True)
    assert verify_database(there) == []
    file = there.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_database(there) == [f"{file} was altered"]
    file.unlink()
    assert verify_database(there) == [f"{file} is missing"]
