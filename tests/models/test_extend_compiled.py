"""Decoding steps of extended models under `torch.compile`: one graph, and the eager numbers."""

import copy

import pytest
import torch
from torch.testing import assert_close

from memlm.models.extend import extend_context
from memlm.testing.tiny import tiny_model, tiny_tokens

TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@pytest.fixture(autouse=True)
def anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compare(model, backend, *, begun, count, mask=None):
    tokens = tiny_tokens(2, begun + count)
    with torch.inference_mode():
        cache = model(tokens[:, :begun], attention_mask=mask, use_cache=True).past_key_values
    twin = copy.deepcopy(cache)

    def step(token, past):
        return model(token, past_key_values=past, use_cache=True).logits

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    where = [layer.keys.data_ptr() for layer in cache.layers]
    with torch.no_grad():
        for column in range(begun, begun + count):
            token = tokens[:, column : column + 1]
            assert_close(compiled(token, cache), step(token, twin), **TOLERANCE)
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        assert cache.get_seq_length() == twin.get_seq_length() == begun + count
        # and on without a compiler: one token, several, some back
        for size in (1, 9):
            more = tiny_tokens(2, size, seed=size)
            assert_close(step(more, cache), step(more, twin), **TOLERANCE)
        cache.crop(-5)
        twin.crop(-5)
        assert_close(step(token, cache), step(token, twin), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # of Bloom's own GELU
@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "bloom"])
def test_a_step_is_one_graph_and_stays_it(family):
    """While sinks and ring fill, and over laps of the ring."""
    model = extend_context(tiny_model(family), window=16, sinks=[(0, 3), (7, 10)])
    backend = Counting()
    compare(model, backend, begun=5, count=90)
    assert backend.graphs == 1


def test_padding_in_the_cache():
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :20] = 0
    backend = Counting()
    model = extend_context(tiny_model("llama"), window=16, sinks=3)
    compare(model, backend, begun=30, count=20, mask=mask)
    assert backend.graphs == 1


def test_a_mask_that_grows_is_not_compiled_for_ever():
    """Every step has a longer mask: its length becomes a symbol."""
    model, backend = extend_context(tiny_model("llama"), window=16, sinks=3), Counting()
    tokens, mask = tiny_tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :12] = 0
    with torch.inference_mode():
        expected = model(tokens, attention_mask=mask).logits[:, 20:]
        cache = model(tokens[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
    compiled, rows = torch.compile(model, fullgraph=True, backend=backend), []
    with torch.no_grad():
        for at in range(20, 40):
            inputs = {"attention_mask": mask[:, : at + 1], "past_key_values": cache}
            rows.append(compiled(tokens[:, at : at + 1], use_cache=True, **inputs).logits)
    assert_close(torch.cat(rows, dim=1), expected, **TOLERANCE)
    assert backend.graphs <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when its compiler is imported
def test_a_step_by_the_real_compiler():
    model = extend_context(tiny_model("llama"), window=16, sinks=3)
    compare(model, "inductor", begun=40, count=60)
