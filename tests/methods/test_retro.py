"""RETRO from text to neighbours, and its demonstration on a few documents."""

import json

import pytest
import torch

from memlm.core.errors import InputError, StoreError
from memlm.methods.retro import index_chunks, make_retriever, retro_database
from memlm.methods.retro_demo import demo
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.embeddings import embed_chunks
from tests.retrieval.texts import CountingEncoder, documents


def test_dense_in_one_call_is_the_stages(tokenizer, tmp_path):
    encoder = CountingEncoder()
    settings = {"chunk_size": 8, "retriever": "reranked", "encoder": encoder, "quiet": True}
    database, table = retro_database(documents(), tokenizer, tmp_path, **settings)
    assert table.record["retriever"]["retriever"] == "reranked"
    assert (tmp_path / "index" / "index.json").exists()
    done = encoder.embedded
    again = retro_database(documents(), tokenizer, tmp_path, **settings)[1]
    assert encoder.embedded == done
    assert (again.ids == table.ids).all()
    assert len(index_chunks(database)) == len(database)


def test_what_a_dense_retriever_needs(tokenizer, tmp_path):
    database, _ = retro_database(documents(), tokenizer, tmp_path, chunk_size=8, quiet=True)
    with pytest.raises(InputError, match="needs the encoder"):
        make_retriever(database, "dense")
    with pytest.raises(InputError, match="must be 'bm25', 'dense' or 'reranked'"):
        make_retriever(database, "sparse")  # pyright: ignore
    with pytest.raises(StoreError, match="memlm retro embed"):
        make_retriever(database, "dense", CountingEncoder())
    embed_chunks(database, CountingEncoder(), quiet=True)
    assert make_retriever(database, "dense", CountingEncoder()).describe()["index"]


def test_a_model_reads_packed_pieces_as_if_each_were_alone(tokenizer, tmp_path):
    """Data and model agree on where chunks end, whose neighbours are whose, and what is apart."""
    database, table = retro_database(documents(20), tokenizer, tmp_path, chunk_size=4, quiet=True)
    data = RetroDataset(database, table, chunks_per_sequence=6)
    torch.manual_seed(0)
    config = RetroConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=8,
        encoder_hidden_size=16,
        encoder_num_layers=1,
        chunk_size=4,
        cross_attention_layers=(1, 2),
        initializer_range=0.5,
    )
    model = RetroForCausalLM(config).eval()
    several = 0
    for number in range(len(data)):
        item = {name: value[None] for name, value in data[number].items() if name != "labels"}
        with torch.no_grad():
            packed = model(**item, use_cache=False).logits[0]
            bare = {name: value for name, value in item.items() if "neighbour" not in name}
            assert not torch.allclose(packed, model(**bare, use_cache=False).logits[0], atol=1e-3)
        places, read = item["document_ids"][0], 0
        pieces = int(places.max()) + 1
        several += pieces > 1
        for piece in range(pieces):
            own = places == piece
            chunks = int(own.sum()) // 4
            part = slice(read, read + chunks)
            read += chunks
            found = item["neighbours"][:, part], item["neighbour_mask"][:, part]
            arguments = dict(zip(("neighbours", "neighbour_mask"), found, strict=True))
            with torch.no_grad():
                alone = model(item["input_ids"][:, own], **arguments if chunks else {})
            torch.testing.assert_close(alone.logits[0], packed[own], atol=2e-5, rtol=1e-4)
    assert several


def test_the_demonstration_on_a_few_documents(tmp_path):
    texts = documents(60, seed=3)
    said = []
    result = demo(tmp_path, texts[:50], texts[50:], seconds=2.0, prompt="the cat", say=said.append)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert list(saved["retrieval"]) == ["on", "off", "shuffled"]
    tokens = {one.tokens for one in result.evaluations.values()}
    assert len(tokens) == 1
    assert result.completion.startswith("the cat")
    assert "<h2>Chunk 0" in (tmp_path / "neighbours.html").read_text()
    assert any("looked up by BM25" in line for line in said)
