"""Pairs (hidden state, token that followed it) as candidates, and what memories with state check.

    score of pair i = sim(query, key_i) / temperature,   proposed token = what followed key_i

`LocalMemory` and `LongMemory` hold such pairs and differ only in which ones.
"""

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import Candidates
from memlm.memory.scores import similarity


def pair_candidates(
    query: Tensor,
    keys: Tensor,
    tokens: Tensor,
    real: Tensor,
    *,
    metric: str,
    temperature: float,
    first: int = 0,
) -> Candidates:
    """Every pair of a row is a candidate of its query.

    Args:
        query: ``(rows, dim)``.
        keys: ``(rows, pairs, dim)`` on any device.
        tokens: ``(rows, pairs)`` int64, what followed each.
        real: ``(rows, pairs)`` bool, False where there is no pair.
        metric: "ip", "l2" or "cosine".
        temperature: divides the scores.
        first: number of the first pair; ids count from it.

    Returns:
        Candidates ``(rows, pairs)`` on the query's device; without pairs, one column that is not
        valid.

    Raises:
        InputError: if there are pairs and the query does not fit them.
    """
    rows, count = tokens.shape
    device = query.device
    if count == 0:  # one empty column: not every reader takes a width of zero
        nothing = torch.zeros(len(query), 1, dtype=torch.int64, device=device)
        scores = torch.full_like(nothing, -torch.inf, dtype=torch.float32)
        return Candidates(scores, nothing, nothing - 1, nothing.bool())
    check_query(query, rows, keys.shape[-1])
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = similarity(query.to(dtype), keys.to(device, dtype), metric) / temperature
    ids = torch.arange(first, first + count, device=device).expand(rows, count)
    return Candidates(scores, tokens.to(device), ids, real.to(device))


def check_query(query: Tensor, rows: int, dim: int) -> None:
    """Raise InputError unless the query is ``(rows, dim)``."""
    check(
        query.shape == (rows, dim),
        f"queries must be ({rows}, {dim}) like the state, got {tuple(query.shape)}; read with the "
        "rows that were observed",
    )


def check_observed(tokens: Tensor, keys: Tensor, rows: int, dim: int | None = None) -> None:
    """Raise InputError unless tokens and keys fit each other and a state.

    Args:
        tokens: ``(rows, time)`` int64.
        keys: ``(rows, time, dim)``.
        rows: of the state.
        dim: of the state; None: any.
    """
    fits = tokens.dim() == 2 and len(tokens) == rows and keys.shape[:-1] == tokens.shape
    check(
        fits and dim in (None, keys.shape[-1]),
        f"tokens (rows, time) and keys (rows, time, dim) must fit the state of {rows} rows"
        f"{'' if dim is None else f' and {dim} dimensions'}, got {tuple(tokens.shape)} and "
        f"{tuple(keys.shape)}; make a new state for another batch",
    )
