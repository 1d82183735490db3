"""Parts of the demo: the line about length, the rows of the text that is read."""

import pytest

import memlm
from memlm.data.tokens import TokenCorpus
from memlm.methods.demo import evaluate_reading, length_line
from memlm.testing.tiny import tiny_model, tiny_tokens


def line(family, tokens, **settings):
    model = tiny_model(family, **settings)
    return length_line(model, TokenCorpus.from_tokens(tiny_tokens(1, tokens)[0].numpy()), None)


def test_it_measures_what_the_text_has_room_for():
    found = line("llama", 600, max_position_embeddings=32)
    assert found.startswith("perplexity after 32, 128, 512 tokens: vanilla ")
    names, numbers = found.split(": ")[1].split("; "), [4, 4]
    assert [len(part.split()) for part in names] == numbers
    assert "after 32, 128 tokens" in line("llama", 200, max_position_embeddings=32)


def test_it_says_what_is_in_the_way():
    assert "must have the 32 tokens" in line("llama", 20, max_position_embeddings=32)
    assert "come from a table" in line("gpt2", 600, n_positions=32)


def test_rows_of_the_text_that_is_read(tmp_path):
    model = tiny_model("llama")
    dev, test = (
        TokenCorpus.from_tokens(tiny_tokens(1, 90, vocab_size=12, seed=seed)[0].numpy())
        for seed in (1, 2)
    )
    windows = memlm.SlidingWindows(16, 8)
    store = memlm.build_datastore(model, None, dev, tmp_path / "store", windows=windows)
    external = memlm.KnnMemory(store, k=8, temperature=4.0), memlm.Mixture(0.4)
    found, rows = evaluate_reading(model, dev, test, windows, external, threads=None)
    assert list(rows) == ["local", "local + long", "local + long + external"]
    lines = [row.describe() for row in rows.values()]
    assert ["long" in line for line in lines] == [False, True, True]
    assert ["interpolated with memory knn k=8" in line for line in lines] == [False, False, True]
    scale = 16**0.5
    local = memlm.LocalMemory(16, temperature=scale)
    both = memlm.Together(local, memlm.LongMemory(4096, temperature=scale))
    alone = memlm.evaluate(
        model, test, windows, memory=found.apply(both), merge=found.merge, carry="window"
    )
    assert rows["local + long"].perplexity == pytest.approx(alone.perplexity, rel=1e-9)
    assert rows["local + long + external"].perplexity != alone.perplexity
