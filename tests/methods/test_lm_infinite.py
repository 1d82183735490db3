"""LM-Infinite's porch: the paper's settings, in place."""

import torch

import memlm
from memlm.testing.tiny import tiny_model, tiny_tokens


def test_it_is_extend_context_with_the_papers_limit():
    model = tiny_model("llama")
    tokens = tiny_tokens(1, 60)
    assert memlm.lm_infinite(model, window=16, sinks=4) is model
    rows = model(tokens).logits
    memlm.restore_context(model)
    assert not torch.allclose(rows, model(tokens).logits)
    memlm.extend_context(model, window=16, sinks=4)
    assert torch.equal(model(tokens).logits, rows)
