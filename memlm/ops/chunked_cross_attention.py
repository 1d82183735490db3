"""Chunked cross-attention: every token attends to the neighbours of one chunk before it.

RETRO (Borgeaud et al. 2022, section 2.4). With chunks of m tokens, the last token of chunk u and
the m - 1 after it are the queries of chunk u; they attend to the encoded neighbours of that
chunk, laid side by side, and to a null key that is always there::

    column       0 ... m-2 | m-1 ... 2m-2 | 2m-1 ... 3m-2 | ...
    attends to   nothing   | chunk 0      | chunk 1       | ...

so no token sees neighbours of text it has not read. Which token is a query of which chunk, the
caller says by one number per query, its place ``chunk * width + slot``; tokens that attend to
nothing are not given at all. Queries and keys come projected and rotated.

The chunks become the batch of one call of scaled-dot-product attention, so no tensor of scores is
held. Differs from the papers' code: no zero rows stand in for missing queries at the two ends.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def reference_chunked_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, places: Tensor, width: int
) -> Tensor:
    """One query after another: what `chunked_cross_attention` computes, to read and test with."""
    rows = []
    for one, place in zip(query, places.tolist(), strict=True):
        chunk = place // width
        seen = visible[chunk]
        scores = torch.einsum("hd,hkd->hk", one, key[chunk][:, seen]) * one.shape[-1] ** -0.5
        rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), value[chunk][:, seen]))
    return torch.stack(rows) if rows else query


def chunked_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    places: Tensor,
    width: int,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of queries to the keys of their chunks.

    Args:
        query: ``(queries, heads, dim)``.
        key: ``(chunks, heads, keys, dim)``.
        value: alike.
        visible: ``(chunks, keys)`` bool; at least one key of each chunk (the null key).
        places: ``(queries,)`` int64, ``chunk * width + slot`` with ``0 <= slot < width``, all
            different.
        width: most queries a chunk can have.
        dropout: on the attention weights.

    Returns:
        ``(queries, heads, dim)``.
    """
    chunks, heads, _, dim = key.shape
    rows = query.new_zeros(chunks * width, heads, dim).index_copy(0, places, query)
    mixed = F.scaled_dot_product_attention(
        rows.unflatten(0, (chunks, width)).transpose(1, 2),
        key,
        value,
        attn_mask=None if bool(visible.all()) else visible[:, None, None],
        dropout_p=dropout,
    )
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, places)
