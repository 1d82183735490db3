"""Scores of given keys for given queries, in difference form: exact to the last digits."""

import torch
from torch import Tensor

from memlm.index.metrics import METRICS, check_choice


def similarity(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """How near each row's own keys are; higher is nearer.

    Args:
        query: ``(rows, dim)``.
        keys: ``(rows, n, dim)`` of the query's dtype.
        metric: "l2" (minus the squared distance), "ip" or "cosine".

    Returns:
        ``(rows, n)``.

    Raises:
        InputError: for an unknown metric.
    """
    check_choice("metric", metric, METRICS)
    query = query.unsqueeze(1)
    if metric == "l2":
        return -(keys - query).square().sum(-1)
    if metric == "cosine":
        return torch.nn.functional.cosine_similarity(query, keys, dim=-1)
    return (keys * query).sum(-1)
