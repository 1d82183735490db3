"""Partial attention: what one set of keys gives a query, ready to be joined with other sets.

    lse    = logsumexp_j score_j                     how much mass the set claims
    output = sum_j exp(score_j - lse) value_j

Two sets under one softmax are a union, as at the output site (`memlm.ops.merge`), with a vector for
payload: ``lse = logaddexp(a, b)``, outputs weighted by ``exp(. - lse)``. An empty set has
``lse = -inf`` and changes nothing.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.ops.logsumexp import safe_logaddexp


class Part(NamedTuple):
    """Attention over one set of keys.

    Attributes:
        output: ``(batch, heads, queries, value dim)``.
        lse: ``(batch, heads, queries)``; -inf where the query sees none of the set.
    """

    output: Tensor
    lse: Tensor

    def narrow(self, begin: int, end: int) -> "Part":
        """The queries ``begin`` to ``end``."""
        return Part(self.output[:, :, begin:end], self.lse[:, :, begin:end])


def union_of_parts(*parts: Part) -> Tensor:
    """``(batch, heads, queries, value dim)`` of all sets under one softmax, in float32 at least.

    Zeros where all are empty.
    """
    total = functools.reduce(safe_logaddexp, (part.lse for part in parts))
    total = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
    work = torch.promote_types(parts[0].output.dtype, total.dtype)
    return sum(  # type: ignore[return-value]
        part.output.to(work) * (part.lse - total).exp()[..., None] for part in parts
    )
