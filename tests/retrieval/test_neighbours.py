import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import memlm.retrieval.embeddings as embedding
import memlm.retrieval.neighbours as table
from memlm.core.errors import FingerprintError, InputError, StoreError
from memlm.data.documents import Document
from memlm.index.exact import ExactIndex
from memlm.retrieval.build import append_documents, delete_documents
from memlm.retrieval.embeddings import Embeddings, embed_chunks
from memlm.retrieval.lookup import ChunkLookup
from memlm.retrieval.neighbours import NeighbourTable, build_neighbours, near_duplicate_share
from memlm.retrieval.overlap import longest_common_run
from memlm.retrieval.retrievers import (
    Bm25Retriever,
    DenseRetriever,
    RerankedRetriever,
    own_documents,
)
from tests.retrieval.texts import CountingEncoder, database, documents


def dense(there, encoder=None, **settings):
    encoder = encoder or CountingEncoder()
    embeddings = embed_chunks(there, encoder, quiet=True, **settings)
    return DenseRetriever(there, encoder, embeddings, ExactIndex(embeddings.load_keys()))


def retrievers(there):
    bm25 = Bm25Retriever(there)
    nearest = dense(there)
    return [bm25, nearest, RerankedRetriever(nearest, bm25, recall=20)]


@pytest.fixture
def there(tokenizer, tmp_path):
    return database(tmp_path / "database", tokenizer, documents(12))


@pytest.mark.parametrize("which", range(3), ids=["bm25", "dense", "reranked"])
def test_no_chunk_finds_its_own_document_or_a_deleted_one(which, there):
    there = delete_documents(there.path, ["doc-3"])
    found = build_neighbours(there, retrievers(there)[which], k=4, quiet=True)
    ids = np.asarray(found.ids)
    own = there.document_of(np.arange(len(there)))
    alive = own != 3
    neighbours = np.where(ids < 0, -1, there.document_of(np.maximum(ids, 0)))
    assert not (neighbours == own[:, None]).any()
    assert not (neighbours == 3).any()
    assert (ids[~alive] == -1).all()
    assert (ids[alive] >= 0).mean() > 0.9
    scores = np.asarray(found.scores)[alive]
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_dense_neighbours_are_the_nearest(there):
    retriever = dense(there)
    found = build_neighbours(there, retriever, k=3, quiet=True)
    keys = embed_chunks(there, CountingEncoder(), quiet=True).load_keys().double()
    distances = torch.cdist(keys, keys) ** 2
    for chunk in range(len(there)):
        others = there.document_of(np.arange(len(there))) != there.document_of(chunk)
        best = distances[chunk][torch.from_numpy(others)].sort().values[:3]
        torch.testing.assert_close(distances[chunk, found.ids[chunk].tolist()], best)


def test_own_chunks_are_not_embedded_again(there):
    encoder = CountingEncoder()
    retriever = dense(there, encoder)
    embedded = encoder.embedded
    settings = {"k": 3, "near_duplicates": 0.9, "quiet": True}
    found = build_neighbours(there, retriever, there.path / "own", **settings)
    assert encoder.embedded == embedded == len(there)
    chunks = there.chunks(np.arange(len(there)))
    exclusion = own_documents(there, np.arange(len(there)))
    expected = retriever.search(chunks, 3, exclusion)
    assert encoder.embedded == 2 * embedded
    plain = build_neighbours(there, retriever, k=3, quiet=True)
    np.testing.assert_array_equal(plain.ids, expected.ids)
    assert (np.asarray(found.ids) >= 0).any()


def test_exclusion_is_exact_however_large_a_document(tokenizer, tmp_path):
    """One document nearly fills the database, and its chunks are the nearest to each other."""
    texts = [Document("large", "cat " * 400), *documents(3)]
    there = database(tmp_path, tokenizer, texts)
    others = len(there) - int(there.chunk_offsets[1])
    found = build_neighbours(there, dense(there), k=others + 1, quiet=True)
    ids = np.asarray(found.ids)[: there.chunk_offsets[1]]
    assert (np.sort(ids, axis=1)[:, 1:] == np.arange(there.chunk_offsets[1], len(there))).all()
    assert (ids[:, -1] == -1).all()


def test_one_document_has_no_neighbours(tokenizer, tmp_path):
    there = database(tmp_path, tokenizer, [Document("only", "cat sat " * 20)])
    with pytest.warns(UserWarning, match="no chunk of .* has a neighbour"):
        build_neighbours(there, dense(there), quiet=True)


def test_bm25_prefers_shared_rare_words(tokenizer, tmp_path):
    texts = [
        Document("question", "the cat told a story"),
        Document("other", "the the the the dog dog dog"),
        Document("answer", "a story about memory"),
    ]
    there = database(tmp_path, tokenizer, texts, chunk_size=16)
    found = Bm25Retriever(there).search([there.chunk(0)], 3)
    assert found.ids[0].tolist()[:2] == [0, 2]
    assert Bm25Retriever(there).search([np.array([31])], 2).ids.tolist() == [[-1, -1]]


def test_near_duplicates_are_replaced_by_the_next_best(tokenizer, tmp_path):
    text = documents(1, longest=60)[0].text
    text = " ".join([text] * 3)[:240]
    copies = [Document(f"copy-{number}", text) for number in range(5)]
    there = database(tmp_path, tokenizer, [*copies, *documents(6, seed=5)], chunk_size=16)
    retriever = Bm25Retriever(there)
    plain = build_neighbours(there, retriever, tmp_path / "plain", k=2, quiet=True)
    strict = build_neighbours(
        there, retriever, tmp_path / "strict", k=2, near_duplicates=0.5, quiet=True
    )
    copied = there.chunk_offsets[5]
    assert (np.asarray(plain.ids[:copied]) < copied).any()
    for chunk in range(len(there)):
        for neighbour in strict.ids[chunk]:
            if neighbour >= 0:
                tokens, valid = there.gather(neighbour)
                assert near_duplicate_share(there.chunk(chunk), tokens[valid]) < 0.5
    assert (np.asarray(strict.ids) >= 0).mean() > 0.9


def test_share_of_sequences():
    chunk = np.arange(16)
    assert near_duplicate_share(chunk, chunk) == 1.0
    assert near_duplicate_share(chunk, chunk[:8]) == pytest.approx(1 / 9)
    assert near_duplicate_share(chunk, chunk[::-1]) == 0.0
    assert near_duplicate_share(chunk[:0], chunk) == 0.0


def test_longest_common_run_is_the_longest():
    draw = np.random.default_rng(0)
    for _ in range(50):
        one, other = draw.integers(0, 3, 12), draw.integers(0, 3, 20)
        run = longest_common_run(one, other)
        shared = one[run.first : run.first + run.length]
        np.testing.assert_array_equal(shared, other[run.other : run.other + run.length])
        longer = {tuple(one[i : i + run.length + 1]) for i in range(len(one) - run.length)}
        assert not any(
            tuple(other[i : i + run.length + 1]) in longer for i in range(len(other) - run.length)
        )


def test_embedding_goes_on_after_a_kill(there, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "_RANGE", 8)
    whole = embed_chunks(there, CountingEncoder(), tmp_path / "whole", quiet=True)
    with pytest.raises(KeyboardInterrupt):
        embed_chunks(
            there, CountingEncoder(fail_at=3), tmp_path / "killed", batch_size=4, quiet=True
        )
    with pytest.raises(StoreError, match="an embedding of every chunk"):
        Embeddings.open(tmp_path / "killed", there)
    encoder = CountingEncoder()
    resumed = embed_chunks(there, encoder, tmp_path / "killed", batch_size=4, quiet=True)
    assert 0 < encoder.embedded < len(there)
    assert torch.equal(whole.load_keys(), resumed.load_keys())
    assert whole.fingerprint == resumed.fingerprint


def test_only_new_documents_are_embedded(tokenizer, tmp_path):
    there = database(tmp_path, tokenizer, documents(4))
    old = embed_chunks(there, CountingEncoder(), quiet=True).load_keys()
    more = append_documents(tmp_path, documents(7), tokenizer, quiet=True)
    encoder = CountingEncoder()
    new = embed_chunks(more, encoder, quiet=True)
    assert encoder.embedded == len(more) - len(there)
    assert torch.equal(new.load_keys()[: len(old)], old)
    ids = torch.tensor([[len(more) - 1, 0], [3, len(there)]])
    assert torch.equal(new.gather(ids), new.load_keys()[ids])


def test_another_encoder_is_refused(there):
    embed_chunks(there, CountingEncoder(), quiet=True)
    with pytest.raises(FingerprintError, match="must be of the encoder in use"):
        embed_chunks(there, CountingEncoder("another"), quiet=True)
    embeddings = embed_chunks(there, CountingEncoder("another"), rebuild=True, quiet=True)
    with pytest.raises(FingerprintError, match="must be the one that made"):
        DenseRetriever(there, CountingEncoder(), embeddings, ExactIndex(embeddings.load_keys()))


@pytest.mark.parametrize("lost", [None, "ids.npy", "scores.npy"])
def test_a_table_goes_on_after_a_kill(there, tmp_path, monkeypatch, lost):
    monkeypatch.setattr(table, "_RANGE", 8)
    retriever = Bm25Retriever(there)
    whole = build_neighbours(there, retriever, tmp_path / "whole", quiet=True)
    search, calls = Bm25Retriever.search, []

    def dying(self, chunks, k, exclusion=None, **settings):
        calls.append(len(chunks))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(self, chunks, k, exclusion, **settings)

    monkeypatch.setattr(Bm25Retriever, "search", dying)
    with pytest.raises(KeyboardInterrupt):
        build_neighbours(there, retriever, tmp_path / "killed", quiet=True)
    with pytest.raises(StoreError, match="finished table"):
        NeighbourTable.open(tmp_path / "killed", there, there)
    if lost is not None:
        (tmp_path / "killed" / lost).unlink()
    resumed = build_neighbours(there, retriever, tmp_path / "killed", quiet=True)
    assert sum(calls[3:]) == len(there) - (16 if lost is None else 0)
    np.testing.assert_array_equal(whole.ids, resumed.ids)
    np.testing.assert_array_equal(whole.scores, resumed.scores)
    assert not (tmp_path / "killed" / "journal.jsonl").exists()


def test_a_table_of_something_else_is_refused(there, tokenizer):
    build_neighbours(there, Bm25Retriever(there), quiet=True)
    with pytest.raises(FingerprintError, match="k is 3 here and 2 there"):
        build_neighbours(there, Bm25Retriever(there), k=3, quiet=True)
    with pytest.raises(FingerprintError, match="retriever_fingerprint"):
        build_neighbours(there, Bm25Retriever(there, k1=1.2), quiet=True)
    more = append_documents(there.path, [Document("new", "a cat story")], tokenizer, quiet=True)
    with pytest.raises(FingerprintError, match="make the table again"):
        NeighbourTable.open(there.path / "neighbours", more, more)
    again = build_neighbours(more, Bm25Retriever(more), rebuild=True, quiet=True)
    assert len(again) == len(more)
    with pytest.raises(InputError, match="k must lie between 1 and the table's 2"):
        again.lookup(0, 3)


def test_held_out_text_may_find_everything(there, tokenizer, tmp_path):
    text = database(tmp_path / "text", tokenizer, documents(12)[:2])
    found = build_neighbours(text, dense(there), tmp_path / "table", k=1, quiet=True)
    for chunk in range(len(text)):
        np.testing.assert_array_equal(there.chunk(found.ids[chunk, 0]), text.chunk(chunk))
    other = database(tmp_path / "other", tokenizer, chunk_size=4)
    with pytest.raises(InputError, match="one tokenizer and chunk size"):
        build_neighbours(other, dense(there), quiet=True)


def test_looking_up_while_generating(there):
    lookup = ChunkLookup(Bm25Retriever(there), k=3)
    tokens, mask = lookup.retrieve([torch.from_numpy(there.chunk(0)), torch.tensor([31])])
    assert tokens.shape == mask.shape == (2, 3, 16)
    assert tokens[0, 0, :8].tolist() == there.chunk(0).tolist()
    assert not mask[1].any()


_KILLED = """
import sys, time
import memlm.retrieval.embeddings as embedding
from memlm.retrieval.chunks import ChunkDatabase
from tests.retrieval.texts import CountingEncoder

class Slow(CountingEncoder):
    def encode(self, chunks):
        time.sleep(0.2)
        return super().encode(chunks)

embedding._RANGE = 8
embedding.embed_chunks(ChunkDatabase.open(sys.argv[1]), Slow(), batch_size=4, quiet=True)
"""


def test_sigkill(there, monkeypatch):
    """The process itself dies; what its journal says is finished is used."""
    monkeypatch.setattr(embedding, "_RANGE", 8)
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(there.path)])
    journal = there.path / "embeddings" / "journal.jsonl"
    for _ in range(600):
        if journal.exists() and journal.read_bytes():
            break
        time.sleep(0.1)
    process.kill()
    assert process.wait() == -9
    encoder = CountingEncoder()
    resumed = embed_chunks(there, encoder, batch_size=4, quiet=True)
    assert encoder.embedded <= len(there) - 8
    expected = embed_chunks(there, CountingEncoder(), there.path / "whole", quiet=True)
    assert torch.equal(resumed.load_keys(), expected.load_keys())
