"""Merging memories: one softmax over several sets of candidates. Read this first.

Every memory answers a query with scored candidates, and so does the model itself: its candidates
are the whole vocabulary, its scores the logits. Scoring a known next token y needs two numbers:

    lse        = logsumexp_j s_j                  (how much mass is claimed)
    target_lse = logsumexp_{j: token_j = y} s_j   (how much of it is on y)

so that ``log p(y) = target_lse - lse``. Ways to merge:

* `union` puts all candidates under one softmax (TRIME, Zhong et al. 2022, eq. 4). It is
  associative and commutative with the empty memory (-inf, -inf) as identity, so the result does
  not depend on how candidates are split over windows, shards or devices.
* `mixture` normalises each first, then interpolates (kNN-LM, Khandelwal et al. 2020, eq. 3):
  ``p = (1 - lam) p_model + lam p_memory``.
* `gate` is a mixture with ``lam = sigmoid(slope * (lse_memory - lse_model) + bias)``; its slope of
  1 without bias is the union, its slope of 0 the mixture.
* `shares` is a mixture whose weights the memory brings: its scores are logarithms of
  ``sum_i lam_i p_i`` over several memories, so ``p = (1 - sum_i lam_i) p_model + sum_i lam_i p_i``.

All exist for known targets (`union`, `mixture`, `gate`, `shares`) and for vocabulary rows
(`union_logits`, `mixture_logits`, `gate_logits`, `shares_logits`). Rows are unnormalised
log-scores: they sum to one after a softmax.

Differs from the papers' code: a row with ``lam = 0`` or without any candidate is the model's own,
bit for bit (the originals lose the mass lam there), and empty rows carry no NaN gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.core.errors import InputError
from memlm.core.merges import Gate, Merge, Shares, Union
from memlm.core.types import Candidates, TargetPartial
from memlm.ops.logsumexp import safe_log, safe_logaddexp, safe_logsumexp
from memlm.ops.tokens import token_log_scores

_ROUNDING = 1e-4  # by which weights may seem to sum to more than one


def union(*parts: TargetPartial) -> TargetPartial:
    """Join candidate sets under one softmax.

    Args:
        parts: at least one; all of one shape ``(queries,)``.

    Raises:
        InputError: if there is none or the shapes differ.
    """
    if not parts:
        raise InputError("union needs at least one memory, got none; pass the model's own partial")
    for part in parts:
        _same_queries(parts[0].lse, part.lse)
    return TargetPartial(
        lse=safe_logsumexp(torch.stack([part.lse for part in parts]), dim=0),
        target_lse=safe_logsumexp(torch.stack([part.target_lse for part in parts]), dim=0),
    )


def mixture(lam: float | Tensor, base: TargetPartial, memory: TargetPartial) -> TargetPartial:
    """Interpolate two distributions at the target: ``(1 - lam) base + lam memory``.

    Args:
        lam: weight of the memory in [0, 1], a number or ``(queries,)``.
        base: the model's partial.
        memory: the memory's partial; queries it has no candidate for keep ``base``.

    Returns:
        A partial with ``lse = 0`` where the two were mixed, and ``base`` itself elsewhere.

    Raises:
        InputError: if the shapes differ.
    """
    lam = _weight(lam, base.lse)
    return _mixed(lam > 0, safe_log(1 - lam), safe_log(lam), base, memory)


def gate(
    slope: float | Tensor, bias: float | Tensor, base: TargetPartial, memory: TargetPartial
) -> TargetPartial:
    """Interpolate with a weight of each query's own, see `memlm.core.merges.Gate`.

    Args:
        slope: a number, or a scalar tensor to be learnt.
        bias: alike.
        base: the model's partial.
        memory: the memory's partial; queries it has no candidate for keep ``base``.

    Returns:
        As `mixture`.

    Raises:
        InputError: if the shapes differ.
    """
    _same_queries(base.lse, memory.lse)
    odds = _log_odds(slope, bias, base.lse, memory.lse)
    asked = torch.ones_like(odds, dtype=torch.bool)
    return _mixed(asked, F.logsigmoid(-odds), F.logsigmoid(odds), base, memory)


def shares(base: TargetPartial, memory: TargetPartial) -> TargetPartial:
    """Interpolate with the weights that the memory brings, see `memlm.core.merges.Shares`.

    Args:
        base: the model's partial.
        memory: ``lse`` is the logarithm of the weights' sum, ``target_lse`` that of
            ``sum_i lam_i p_i(target)``; queries it has no candidate for keep ``base``.

    Returns:
        As `mixture`.

    Raises:
        InputError: if the shapes differ, or the weights sum to more than one.
    """
    log_rest, log_lam = _shared(memory.lse)
    return _mixed(torch.ones_like(log_lam, dtype=torch.bool), log_rest, log_lam, base, memory)


def _mixed(
    asked: Tensor, log_rest: Tensor, log_lam: Tensor, base: TargetPartial, memory: TargetPartial
) -> TargetPartial:
    """The mixture at given logarithms of the weights, ``(queries,)`` each."""
    _same_queries(base.lse, memory.lse)
    mixed = asked & ~torch.isneginf(memory.lse)
    memory_lse = torch.where(mixed, memory.lse, torch.zeros_like(memory.lse))
    log_probability = safe_logaddexp(
        log_rest + base.target_lse - base.lse, log_lam + memory.target_lse - memory_lse
    )
    return TargetPartial(
        lse=torch.where(mixed, torch.zeros_like(base.lse), base.lse),
        target_lse=torch.where(mixed, log_probability, base.target_lse),
    )


def union_logits(logits: Tensor, candidates: Candidates) -> Tensor:
    """Vocabulary rows of a union: ``logaddexp(logits, token scores)``.

    Args:
        logits: ``(queries, vocab)`` of the model.
        candidates: of the same queries.

    Returns:
        ``(queries, vocab)`` unnormalised log-scores, at least float32; the model's own values
        where the memory proposes nothing.
    """
    return safe_logaddexp(*_rows(logits, candidates))


def mixture_logits(lam: float | Tensor, logits: Tensor, candidates: Candidates) -> Tensor:
    """Vocabulary rows of a mixture, as log-probabilities where the memory speaks.

    Args:
        lam: weight of the memory in [0, 1], a number or ``(queries,)``.
        logits: ``(queries, vocab)`` of the model.
        candidates: of the same queries.

    Returns:
        ``(queries, vocab)``, at least float32: log-probabilities of the mixture, and the model's
        logits untouched where ``lam = 0`` or no candidate is valid.
    """
    if isinstance(lam, float | int) and lam == 0:
        return logits
    logits, scores = _rows(logits, candidates)
    lam = _weight(lam, logits[:, 0])
    normaliser = safe_logsumexp(scores)
    return _mixed_rows(lam > 0, safe_log(1 - lam), safe_log(lam), logits, scores, normaliser)


def gate_logits(slope: float, bias: float, logits: Tensor, candidates: Candidates) -> Tensor:
    """Vocabulary rows of a `gate`, as log-probabilities where the memory speaks.

    Args:
        slope: see `memlm.core.merges.Gate`.
        bias: alike.
        logits: ``(queries, vocab)`` of the model.
        candidates: of the same queries.

    Returns:
        As `mixture_logits`.
    """
    logits, scores = _rows(logits, candidates)
    normaliser = safe_logsumexp(scores)
    odds = _log_odds(slope, bias, torch.logsumexp(logits, -1), normaliser)
    asked = torch.ones_like(odds, dtype=torch.bool)
    return _mixed_rows(asked, F.logsigmoid(-odds), F.logsigmoid(odds), logits, scores, normaliser)


def shares_logits(logits: Tensor, candidates: Candidates) -> Tensor:
    """Vocabulary rows of `shares`, as log-probabilities where the memory speaks.

    Args:
        logits: ``(queries, vocab)`` of the model.
        candidates: of the same queries, with scores as `shares` wants them.

    Returns:
        As `mixture_logits`.
    """
    logits, scores = _rows(logits, candidates)
    normaliser = safe_logsumexp(scores)
    log_rest, log_lam = _shared(normaliser)
    asked = torch.ones_like(log_lam, dtype=torch.bool)
    return _mixed_rows(asked, log_rest, log_lam, logits, scores, normaliser)


def _shared(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of the model's and the memories' weights, from what the memories claim."""
    if bool((lse > _ROUNDING).any()):
        raise InputError(
            "under Shares a memory says logarithms of weighted probabilities, which sum to one at "
            f"most, got {float(lse.exp().max()):.3g}; give weights: Together(a, b, lams=(0.2, 0.1))"
        )
    claimed = lse.clamp(max=0)
    return safe_log(-torch.expm1(claimed)), claimed


def _rows(logits: Tensor, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Logits and the memory's token scores, in one dtype of at least float32."""
    scores = token_log_scores(candidates, logits.shape[-1])
    dtype = torch.promote_types(logits.dtype, scores.dtype)
    return logits.to(dtype), scores.to(dtype)


def _mixed_rows(
    asked: Tensor,
    log_rest: Tensor,
    log_lam: Tensor,
    logits: Tensor,
    scores: Tensor,
    normaliser: Tensor,
) -> Tensor:
    """Rows of the mixture at given logarithms of the weights, ``(queries,)`` each."""
    mixed = asked & ~torch.isneginf(normaliser)
    share = torch.where(mixed, log_lam - normaliser, torch.zeros_like(normaliser))
    rows = safe_logaddexp(
        log_rest[:, None] + torch.log_softmax(logits, dim=-1), share[:, None] + scores
    )
    return torch.where(mixed[:, None], rows, logits)


def merge_target(merge: Merge, base: TargetPartial, memory: TargetPartial) -> TargetPartial:
    """Merge a memory into the model's partial as ``merge`` says."""
    if isinstance(merge, Union):
        return union(base, memory)
    if isinstance(merge, Gate):
        return gate(merge.slope, merge.bias, base, memory)
    if isinstance(merge, Shares):
        return shares(base, memory)
    return mixture(merge.lam, base, memory)


def merge_logits(merge: Merge, logits: Tensor, candidates: Candidates) -> Tensor:
    """Merge a memory into the model's vocabulary rows as ``merge`` says."""
    if isinstance(merge, Union):
        return union_logits(logits, candidates)
    if isinstance(merge, Gate):
        return gate_logits(merge.slope, merge.bias, logits, candidates)
    if isinstance(merge, Shares):
        return shares_logits(logits, candidates)
    return mixture_logits(merge.lam, logits, candidates)


def _log_odds(slope: float | Tensor, bias: float | Tensor, model: Tensor, memory: Tensor) -> Tensor:
    """Of the memory, ``(queries,)``; an empty memory counts as the model does, and is not asked."""
    claimed = torch.where(torch.isneginf(memory), model, memory)
    return slope * (claimed - model) + bias


def _weight(lam: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(lam, dtype=like.dtype, device=like.device).expand_as(like)


def _same_queries(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"memories must answer the same queries: got {tuple(a.shape)} and {tuple(b.shape)}; "
            "read every memory with the same query batch"
        )
