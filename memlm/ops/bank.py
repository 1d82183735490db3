"""Scoring known tokens against a bank of keys held in tensors, without the score matrix.

For a query q of target y and the keys k_j it may see (TRIME, Zhong et al. 2022, eq. 3):

    s_j        = scale * q . k_j
    lse        = logsumexp_j s_j
    target_lse = logsumexp_{j: token_j = y} s_j

which is a `TargetPartial`; `merge.union` with the model's own gives TRIME's objective. Who sees
what is a rule on places, (stream, document, position): see `earlier_in_document` and its
neighbours; rules combine with `any_of`. A key never sees itself: "earlier" is strict.

Two exact implementations. ``reference`` holds queries x entries. ``chunked`` holds one tile at a
time, forward and backward, so memory is O(queries + tile) for any bank.

Differs from the paper's code: masked scores are -inf, not -10000; padding is a rule, not token 0.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.core.errors import InputError
from memlm.core.types import Bank, TargetPartial
from memlm.ops.logsumexp import safe_logaddexp, safe_logsumexp

_TILE = 1024


class Places(NamedTuple):
    """Where queries or keys stand; fields as in `Bank`, each ``(n,)`` int64."""

    stream: Tensor
    document: Tensor
    position: Tensor


Visibility = Callable[[Places, Places], Tensor]
"""``(queries, keys) -> (queries, keys)`` bool, True where the query may see the key."""


def earlier_in_document(query: Places, key: Places) -> Tensor:
    """Same stream and document, strictly earlier: TRIME's local memory."""
    return earlier_in_stream(query, key) & (query.document[:, None] == key.document)


def earlier_in_stream(query: Places, key: Places) -> Tensor:
    """Same stream, strictly earlier, any document: TRIME's long-term memory."""
    same = query.stream[:, None] == key.stream
    return same & (key.position < query.position[:, None])


def other_documents(query: Places, key: Places) -> Tensor:
    """Every position of every other document: the external part of TRIME's training memory."""
    return (query.document[:, None] != key.document) | (query.stream[:, None] != key.stream)


def any_of(*rules: Visibility) -> Visibility:
    """Visible where any of the rules says so."""

    def rule(query: Places, key: Places) -> Tensor:
        visible = rules[0](query, key)
        for other in rules[1:]:
            visible = visible | other(query, key)
        return visible

    return rule


def bank_lse(
    query: Tensor,
    bank: Bank,
    targets: Tensor,
    places: Places,
    visibility: Visibility,
    *,
    scale: float,
    impl: Literal["auto", "reference", "chunked"] = "auto",
) -> TargetPartial:
    """Mass of the visible keys, and the part of it on each target.

    Args:
        query: ``(queries, dim)``; gradients flow into it and into ``bank.keys``.
        bank: ``entries`` keys of the same dim and device.
        targets: ``(queries,)`` int64.
        places: of the queries.
        visibility: which keys a query may see.
        scale: multiplies the dot products, e.g. ``1 / sqrt(dim) / temperature``.
        impl: ``auto`` is ``chunked``.

    Returns:
        ``(queries,)`` in at least float32; -inf where nothing is visible, with zero gradient.

    Raises:
        InputError: if the dimensions differ.
    """
    if query.shape[-1] != bank.keys.shape[-1]:
        raise InputError(
            f"queries and keys must have one dimension: got {query.shape[-1]} and "
            f"{bank.keys.shape[-1]}; use the same tap for both"
        )
    function = _reference if impl == "reference" else _chunked
    return function(query, bank, targets, places, visibility, scale)


def _reference(query, bank, targets, places, visibility, scale) -> TargetPartial:
    visible = visibility(places, _places(bank, slice(None)))
    scores = _scores(query, bank.keys, scale).masked_fill(~visible, -torch.inf)
    on_target = targets[:, None] == bank.tokens
    return TargetPartial(
        lse=safe_logsumexp(scores),
        target_lse=safe_logsumexp(scores.masked_fill(~on_target, -torch.inf)),
    )


def _chunked(query, bank, targets, places, visibility, scale) -> TargetPartial:
    return TargetPartial(
        *_ChunkedBank.apply(query, bank.keys, bank, targets, places, visibility, scale)
    )


class _ChunkedBank(torch.autograd.Function):
    """Tile by tile: the forward keeps two numbers per query, the backward computes tiles again."""

    @staticmethod
    def forward(
        ctx: Any, query, keys, bank: Bank, targets, places: Places, visibility, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Stream over tiles of keys with a running log-sum-exp."""
        dtype = _accumulator(query)
        lse = torch.full((len(query),), -torch.inf, dtype=dtype, device=query.device)
        target_lse = lse.clone()
        for rows in _tiles(len(query)):
            for columns in _tiles(len(keys)):
                scores, on_target = _tile(
                    query,
                    bank._replace(keys=keys),
                    targets,
                    places,
                    visibility,
                    scale,
                    rows,
                    columns,
                )
                lse[rows] = safe_logaddexp(lse[rows], safe_logsumexp(scores))
                scores = scores.masked_fill(~on_target, -torch.inf)
                target_lse[rows] = safe_logaddexp(target_lse[rows], safe_logsumexp(scores))
        ctx.save_for_backward(query, keys, targets, lse, target_lse)
        ctx.rest = (bank._replace(keys=None), places, visibility, scale)
        return lse, target_lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """``d lse / d s_j`` is the softmax weight, over all keys and over those on the target."""
        query, keys, targets, lse, target_lse = ctx.saved_tensors
        bank, places, visibility, scale = ctx.rest
        bank = bank._replace(keys=keys)
        grad_lse, grad_target = grads
        grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        grad_keys = torch.zeros(keys.shape, dtype=lse.dtype, device=keys.device)
        for rows in _tiles(len(query)):
            for columns in _tiles(len(keys)):
                scores, on_target = _tile(
                    query, bank, targets, places, visibility, scale, rows, columns
                )
                weight = grad_lse[rows, None] * _share(scores, lse[rows])
                weight += grad_target[rows, None] * _share(scores, target_lse[rows]) * on_target
                weight *= scale
                grad_query[rows] += weight @ keys[columns].to(weight.dtype)
                grad_keys[columns] += weight.T @ query[rows].to(weight.dtype)
        return grad_query.to(query.dtype), grad_keys.to(keys.dtype), *(None,) * 5


def _tile(query, bank, targets, places, visibility, scale, rows, columns) -> tuple[Tensor, Tensor]:
    visible = visibility(Places(*(field[rows] for field in places)), _places(bank, columns))
    scores = _scores(query[rows], bank.keys[columns], scale).masked_fill(~visible, -torch.inf)
    return scores, targets[rows, None] == bank.tokens[columns]


def _share(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``, zero where the set is empty."""
    empty = torch.isneginf(lse)
    share = torch.exp(scores - torch.where(empty, torch.zeros_like(lse), lse)[:, None])
    return share.masked_fill(empty[:, None], 0)


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    dtype = _accumulator(query)
    return (query.to(dtype) @ keys.to(dtype).T) * scale


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _places(bank: Bank, columns: slice) -> Places:
    return Places(bank.stream[columns], bank.document[columns], bank.position[columns])


def _tiles(count: int) -> list[slice]:
    return [slice(start, min(start + _TILE, count)) for start in range(0, count, _TILE)]
