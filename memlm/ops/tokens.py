"""From scored candidates to token scores.

Several candidates may propose the same token; their masses add (kNN-LM, Khandelwal et al. 2020,
eq. 2):

    score(w) = logsumexp_{j: token_j = w} s_j

`target_partial` keeps only the two numbers that a known token needs; `token_log_scores` builds
the whole vocabulary row that generation needs. Neither normalises: that is for `merge`.

Differs from the papers' code: tokens nobody proposes score -inf, not -10000.
"""

import torch
from torch import Tensor

from memlm.core.types import Candidates, TargetPartial
from memlm.ops.logsumexp import finite_max, safe_log, safe_logsumexp


def target_partial(candidates: Candidates, targets: Tensor) -> TargetPartial:
    """The candidates' mass, and the part of it on the target.

    Args:
        candidates: of ``queries`` queries.
        targets: ``(queries,)`` int64.
    """
    scores = candidates.scores.masked_fill(~candidates.valid, -torch.inf)
    on_target = candidates.tokens == targets.unsqueeze(-1)
    return TargetPartial(
        lse=safe_logsumexp(scores),
        target_lse=safe_logsumexp(scores.masked_fill(~on_target, -torch.inf)),
    )


def token_log_scores(candidates: Candidates, vocab_size: int) -> Tensor:
    """Every token's unnormalised log-score, ``(queries, vocab_size)``; -inf where not proposed.

    Args:
        candidates: their valid tokens are below ``vocab_size``.
        vocab_size: width of the rows, the model's number of logits.
    """
    scores = candidates.scores.masked_fill(~candidates.valid, -torch.inf)
    tokens = candidates.tokens.masked_fill(~candidates.valid, 0)
    shift = finite_max(scores)
    mass = torch.zeros(scores.shape[0], vocab_size, dtype=scores.dtype, device=scores.device)
    return safe_log(mass.scatter_add(1, tokens, torch.exp(scores - shift))) + shift
