"""Scoring known tokens against a bank of keys held in tensors, without the score matrix.

For a query q of target y and the keys k_j it may see (TRIME, Zhong et al. 2022, eq. 3):

    s_j        = scale * q . k_j
    lse        = logsumexp_j s_j
    target_lse = logsumexp_{j: token_j = y} s_j

which is a `TargetPartial`; `merge.union` with the model's own gives TRIME's objective. Who sees
what is a rule on places, (stream, document, position): see `earlier_in_document` and its
neighbours; rules combine with `any_of`. A key never sees itself: "earlier" is strict. A key whose
stream is negative is seen by nobody: padding.

Many banks of one size may be asked side by side, ``(..., queries, dim)`` against ``(..., entries,
dim)``: rows of a batch that see only themselves cost a bank each, not the square of all.

Two exact implementations. ``reference`` holds queries x entries. ``chunked`` holds one tile at a
time, forward and backward, so memory is O(queries + tile) for any bank.

Differs from the paper's code: masked scores are -inf, not -10000; padding is a rule, not token 0.
"""

import math
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
    """Where queries or keys stand; fields as in `Bank`, each ``(..., n)`` int64."""

    stream: Tensor
    document: Tensor
    position: Tensor


Visibility = Callable[[Places, Places], Tensor]
"""``(queries, keys) -> (..., queries, keys)`` bool, True where the query may see the key."""


def earlier_in_document(query: Places, key: Places) -> Tensor:
    """Same stream and document, strictly earlier: TRIME's local memory."""
    return earlier_in_stream(query, key) & _same(query.document, key.document)


def earlier_in_stream(query: Places, key: Places) -> Tensor:
    """Same stream, strictly earlier, any document: TRIME's long-term memory."""
    earlier = key.position[..., None, :] < query.position[..., :, None]
    return earlier & _same(query.stream, key.stream) & _real(key)


def other_documents(query: Places, key: Places) -> Tensor:
    """Every position of every other document: the external part of TRIME's training memory."""
    same = _same(query.document, key.document) & _same(query.stream, key.stream)
    return ~same & _real(key)


def _same(query: Tensor, key: Tensor) -> Tensor:
    return query[..., :, None] == key[..., None, :]


def _real(key: Places) -> Tensor:
    return key.stream[..., None, :] >= 0


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
        query: ``(..., queries, dim)``; gradients flow into it and into ``bank.keys``.
        bank: ``entries`` keys of the same dim and device; its fields have the same leading
            dimensions, one bank for each.
        targets: ``(..., queries)`` int64.
        places: of the queries.
        visibility: which keys a query may see.
        scale: multiplies the dot products, e.g. ``1 / sqrt(dim) / temperature``.
        impl: ``auto`` is ``chunked``.

    Returns:
        ``(..., queries)`` in at least float32; -inf where nothing is visible, with zero gradient.

    Raises:
        InputError: if the dimensions differ.
    """
    if query.shape[-1] != bank.keys.shape[-1]:
        raise InputError(
            f"queries and keys must have one dimension: got {query.shape[-1]} and "
            f"{bank.keys.shape[-1]}; use the same tap for both"
        )
    if query.shape[:-2] != bank.keys.shape[:-2]:
        raise InputError(
            "queries and keys must have the same leading dimensions, one bank for each group of "
            f"queries: got {tuple(query.shape)} and {tuple(bank.keys.shape)}; reshape one of them"
        )
    function = _reference if impl == "reference" else _chunked
    # scores are sums of products of many terms: not in the reduced precision of autocast
    with torch.autocast(query.device.type, enabled=False):
        return function(query, bank, targets, places, visibility, scale)


def _reference(query, bank, targets, places, visibility, scale) -> TargetPartial:
    visible = visibility(places, _places(bank, slice(None)))
    scores = _scores(query, bank.keys, scale).masked_fill(~visible, -torch.inf)
    on_target = _same(targets, bank.tokens)
    return TargetPartial(
        lse=safe_logsumexp(scores),
        target_lse=safe_logsumexp(scores.masked_fill(~on_target, -torch.inf)),
    )


def _chunked(query, bank, targets, places, visibility, scale) -> TargetPartial:
    if torch.compiler.is_compiling():  # a graph refuses a function that is given a tensor twice
        bank = Bank(*[field.view_as(field) for field in bank])
        places = Places(*[field.view_as(field) for field in places])
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
        bank = bank._replace(keys=keys)
        lse = torch.full(
            query.shape[:-1], -torch.inf, dtype=_accumulator(query), device=query.device
        )
        target_lse = lse.clone()
        for rows, columns in _tiles(query, keys):
            tile = _tile(query, bank, targets, places, visibility, scale, rows, columns)
            if tile is None:
                continue
            scores, on_target = tile
            lse[..., rows] = safe_logaddexp(lse[..., rows], safe_logsumexp(scores))
            scores = scores.masked_fill_(~on_target, -torch.inf)
            target_lse[..., rows] = safe_logaddexp(target_lse[..., rows], safe_logsumexp(scores))
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
        # a query without a key has no share in anything, whatever the gradient
        grad_lse, grad_target = (
            grad.masked_fill(torch.isneginf(mass), 0)
            for grad, mass in zip(grads, (lse, target_lse), strict=True)
        )
        lse, target_lse = (mass.masked_fill(torch.isneginf(mass), 0) for mass in (lse, target_lse))
        grad_query = torch.zeros(query.shape, dtype=lse.dtype, device=query.device)
        grad_keys = torch.zeros(keys.shape, dtype=lse.dtype, device=keys.device)
        for rows, columns in _tiles(query, keys):
            tile = _tile(query, bank, targets, places, visibility, scale, rows, columns)
            if tile is None:
                continue
            scores, on_target = tile
            weight = (scores - lse[..., rows, None]).exp_().mul_(grad_lse[..., rows, None])
            share = scores.sub_(target_lse[..., rows, None]).masked_fill_(~on_target, -torch.inf)
            weight.addcmul_(share.exp_(), grad_target[..., rows, None]).mul_(scale)
            grad_query[..., rows, :] += weight @ keys[..., columns, :].to(weight.dtype)
            grad_keys[..., columns, :] += weight.mT @ query[..., rows, :].to(weight.dtype)
        return grad_query.to(query.dtype), grad_keys.to(keys.dtype), *(None,) * 5


def _tile(
    query, bank, targets, places, visibility, scale, rows, columns
) -> tuple[Tensor, Tensor] | None:
    """Masked scores and where they are on the target; None if all of it is hidden."""
    visible = visibility(Places(*(field[..., rows] for field in places)), _places(bank, columns))
    asks = visible.device.type == "cpu" and not torch.compiler.is_compiling()
    if asks and not bool(visible.any()):
        return None  # half the tiles of a causal rule; elsewhere to ask costs more than to compute
    scores = _scores(query[..., rows, :], bank.keys[..., columns, :], scale)
    scores.masked_fill_(~visible, -torch.inf)
    return scores, _same(targets[..., rows], bank.tokens[..., columns])


def _scores(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    dtype = _accumulator(query)
    return (query.to(dtype) * scale) @ keys.to(dtype).mT


def _accumulator(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _places(bank: Bank, columns: slice) -> Places:
    fields = (bank.stream, bank.document, bank.position)
    return Places(*(field[..., columns] for field in fields))


def _tiles(query: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    """All pairs of (queries, keys); a tile has about ``_TILE ** 2`` scores over all banks."""
    banks = math.prod(query.shape[:-2])
    size = max(1, int(_TILE / math.sqrt(max(1, banks))))
    return [
        (rows, columns)
        for rows in _slices(query.shape[-2], size)
        for columns in _slices(keys.shape[-2], size)
    ]


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
