"""The line of the demo about length."""

from memlm.data.tokens import TokenCorpus
from memlm.methods.demo import length_line
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
