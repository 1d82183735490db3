"""Chunked cross-attention in one call is what one query after another gives."""

import pytest
import torch

from memlm.ops.chunked_cross_attention import (
    chunked_cross_attention,
    reference_chunked_cross_attention,
)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("chunks", "width", "keys"), [(1, 1, 1), (3, 4, 9), (5, 2, 17)])
def test_equals_the_reference(chunks, width, keys, masked):
    torch.manual_seed(chunks)
    places = torch.randperm(chunks * width)[: max(1, chunks * width - 2)]
    shape = (chunks, 2, keys, 6)
    query = torch.randn(len(places), 2, 6, dtype=torch.float64, requires_grad=True)
    key = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    value = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    visible = torch.rand(chunks, keys) < (0.5 if masked else 2)
    visible[:, 0] = True
    results = [
        function(query, key, value, visible, places, width)
        for function in (chunked_cross_attention, reference_chunked_cross_attention)
    ]
    torch.testing.assert_close(*results, atol=1e-10, rtol=1e-10)
    grads = [torch.autograd.grad(result.square().sum(), (query, key, value)) for result in results]
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


def test_no_queries():
    key = torch.randn(2, 2, 3, 4)
    nothing = chunked_cross_attention(
        torch.empty(0, 2, 4), key, key, torch.ones(2, 3).bool(), torch.empty(0).long(), 4
    )
    assert nothing.shape == (0, 2, 4)
