"""Exact, ordered top-k: by score descending, then by id ascending, also at the k boundary.

`torch.topk` breaks ties arbitrarily, so the same store searched in two splits could return
different neighbours. Here the answer depends on the scores and ids alone. The fast path is
`torch.topk` itself with one extra column; only rows that really tie are looked at again.
"""

import torch
from torch import Tensor

from memlm.core.errors import InputError


def ordered_topk(scores: Tensor, k: int, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k highest scores of every row.

    Args:
        scores: ``(queries, n)``.
        k: how many; at most n are returned.
        ids: ``(queries, n)`` or ``(n,)`` int64 identities that break ties; None: the columns.

    Returns:
        ``(queries, min(k, n))`` scores, descending, and their ids, ascending among equal scores.

    Raises:
        InputError: if k is below 1.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, got {k}")
    n = scores.shape[-1]
    k = min(k, n)
    if k == 0:
        return scores, scores.new_empty(scores.shape, dtype=torch.int64)
    best, columns = torch.topk(scores, min(k + 1, n), dim=-1)
    if n > k:
        tied = (best[:, k] == best[:, k - 1]).nonzero().squeeze(-1)
        best, columns = best[:, :k], columns[:, :k].contiguous()
        if len(tied):
            columns[tied] = _lowest_ids(scores[tied], best[tied, -1:], k, _rows(ids, tied, n))
            best = scores.gather(-1, columns)
    found = columns if ids is None else ids.expand_as(scores).gather(-1, columns)
    return _by_score_then_id(best, found)


def merge_topk(parts: list[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The top k of several ``(scores, ids)`` answers to the same queries (shards of a store).

    Missing entries are ``(-inf, -1)`` and stay last.
    """
    scores = torch.cat([part[0] for part in parts], dim=-1)
    ids = torch.cat([part[1] for part in parts], dim=-1)
    return ordered_topk(scores, k, ids)


def _lowest_ids(scores: Tensor, threshold: Tensor, k: int, ids: Tensor) -> Tensor:
    """Columns of the top k of rows that tie at the boundary: all above, then the lowest ids."""
    order = torch.argsort(ids, dim=-1, stable=True)
    scores = scores.gather(-1, order)
    above, level = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (level & (level.cumsum(-1) <= room))
    return order[chosen].view(len(scores), k)


def _rows(ids: Tensor | None, rows: Tensor, n: int) -> Tensor:
    if ids is None:
        return torch.arange(n, device=rows.device).expand(len(rows), n)
    return ids.expand(len(rows), n) if ids.dim() == 1 else ids[rows]


def _by_score_then_id(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    disordered = ((scores[:, 1:] >= scores[:, :-1]) & (ids[:, 1:] < ids[:, :-1])).any(-1)
    disordered |= (scores[:, 1:] > scores[:, :-1]).any(-1)
    rows = disordered.nonzero().squeeze(-1)
    if len(rows):
        scores, ids = scores.clone(), ids.clone()
        by_id = torch.argsort(ids[rows], dim=-1, stable=True)
        some_scores, some_ids = scores[rows].gather(-1, by_id), ids[rows].gather(-1, by_id)
        by_score = torch.argsort(some_scores, dim=-1, descending=True, stable=True)
        scores[rows] = some_scores.gather(-1, by_score)
        ids[rows] = some_ids.gather(-1, by_score)
    return scores, ids
