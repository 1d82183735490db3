"""Buckets of relative positions (Raffel et al. 2020, T5; Ke et al. 2021, TUPE-R).

An offset ``key - query`` becomes one of ``num_buckets`` numbers: exact while it is small, then
logarithmic up to ``max_distance``, then all the same. With E exact distances of S per side,

    bucket(n) = n                                                   n < E
    bucket(n) = min(S - 1, E + trunc(ln(n / E) / ln(M / E) (S - E)))   otherwise

Bidirectional: half of the buckets for each side, those of keys to the right come second; bucket
``num_buckets // 2`` is never used (an offset of 0 counts as the left side). Causal: all for the
past.

The logarithm is float32 on the CPU whatever the model's device and dtype are, as it was where
published weights were trained: another rounding would move the boundaries at powers of two.
"""

import math

import torch
from torch import Tensor

from memlm.core.config import check


def check_buckets(num_buckets: int, max_distance: int, *, bidirectional: bool) -> None:
    """Raise unless the numbers make a bucket function.

    Raises:
        InputError: if ``num_buckets`` is odd or too small, or ``max_distance`` is within the exact
            part.
    """
    check(num_buckets % 2 == 0, f"num_buckets must be even, got {num_buckets}")
    least = 4 if bidirectional else 2
    check(num_buckets >= least, f"num_buckets must be at least {least}, got {num_buckets}")
    exact = num_buckets // 4 if bidirectional else num_buckets // 2
    check(
        max_distance > exact,
        f"max_distance must be greater than the {exact} exact distances, got {max_distance}",
    )


def relative_buckets(
    offsets: Tensor, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """The bucket of every offset.

    Args:
        offsets: int64 of any shape, ``key position - query position``.
        bidirectional: False: keys after the query count as offset 0.
        num_buckets: even.
        max_distance: where the last bucket begins at the latest.

    Returns:
        int64 of the same shape and device, in ``[0, num_buckets)``.

    Raises:
        InputError: from ``check_buckets``.
    """
    check_buckets(num_buckets, max_distance, bidirectional=bidirectional)
    relative = offsets.cpu()
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    distance = relative.abs() if bidirectional else (-relative).clamp(min=0)
    ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (ratio * (side - exact)).long()).clamp(max=side - 1)
    bucket = torch.where(distance < exact, distance, coarse)
    if bidirectional:
        bucket = bucket + side * (relative > 0)
    return bucket.to(offsets.device)
