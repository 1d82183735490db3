"""Attention with untied positions: content and place are scored apart and added.

    score_ij = s q_i . k_j + P_ij                                        (Ke et al. 2021, eq. 7, 8)
    P_ij     = s pq_i . pk_j + r_{p_j - p_i}      neither token is untied
    P_ij     = theta_1                            i is untied ([CLS] sees no positions)
    P_ij     = theta_2                            only j is (everyone sees [CLS] the same)

pq, pk are projected position vectors, r the optional bucket bias, s = (2 head width)^-1/2. P
depends on no token's content, so a model makes it once for all layers (`memlm.positions.untied`).
Three exact implementations:

* ``"reference"``: the table P, a softmax written out; also returns the weights.
* ``"folded"``: s pq . pk is a dot product, so it is appended to queries and keys,
  q' = [q; pq_i; theta_2 / s; ...], k' = [k; pk_j; 1 if j is untied; ...], and plain SDPA computes
  the sum. theta_1 is left out: a constant over a whole row cancels in the softmax. Padding and
  documents are folded too: one coordinate is a large negative number times 1 for keys out of sight
  and times 0 otherwise, so nothing else loses a bit. No T x T tensor is made; with a bucket bias
  (heads, T, T), never one per batch row: where torch's attention would make one (a bias of every
  row's own; on a CPU also to learn the bias, and for dropout), queries are taken a block at a time,
  and once more on the way back. What torch's CUDA kernels hold to learn a bias is their affair.
* ``"flex"``: the folded queries and keys under FlexAttention, the bucket bias as its score_mod:
  no T x T tensor at all. Fused on CUDA, where it is compiled; elsewhere torch runs it unfused.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memlm.core.errors import InputError

Impl = Literal["auto", "reference", "folded", "flex"]

_BLOCK = 2**22  # scores at a time, where queries are taken in blocks: 16 MB in float32


class PositionTerms(NamedTuple):
    """What positions add to scores, for ``time`` keys; queries are the last of them.

    ``rows`` is 1 where all rows of the batch have the same positions.

    Attributes:
        query: ``(rows, heads, time, dim)`` projected positions, zero at untied tokens; or None.
        key: likewise; both are multiplied by the attention's scale, as content is.
        positions: ``(rows, time)`` int64.
        untied: ``(rows, time)`` bool, or None if no token is.
        from_untied: ``(heads,)`` theta_1, the score that an untied query gives to every key.
        to_untied: ``(heads,)`` theta_2, the score that any other query gives to an untied key.
        by_offset: ``(heads, 2 reach + 1)`` bucket bias of offsets -reach .. reach (beyond, it is
            constant), or None.
        shared_bias: ``(heads, time, time)`` bucket bias where ``rows`` is 1 (untied rows and
            columns zero), or None.
    """

    query: Tensor | None
    key: Tensor | None
    positions: Tensor
    untied: Tensor | None
    from_untied: Tensor
    to_untied: Tensor
    by_offset: Tensor | None
    shared_bias: Tensor | None


class Sight(NamedTuple):
    """Which keys a query may see, beside the positions; each part is optional.

    Attributes:
        valid: ``(batch, time)`` bool, False for padding.
        documents: ``(batch, time)`` int64: only keys with the query's number are seen (packing).
        causal: no key after the query.
        visible: ``(batch or 1, 1, queries, time)`` bool, any other rule, as for a prefix LM.
    """

    valid: Tensor | None = None
    documents: Tensor | None = None
    causal: bool = False
    visible: Tensor | None = None


def offset_bias(terms: PositionTerms, queries: int) -> Tensor:
    """The bucket bias of every pair, ``(rows, heads, queries, time)``; zero at untied tokens."""
    if terms.by_offset is None:
        raise InputError("these position terms have no relative part")
    return _offset_bias(terms, terms.by_offset, slice(-queries, None))


def _offset_bias(terms: PositionTerms, by_offset: Tensor, asking: slice) -> Tensor:
    reach = by_offset.shape[1] // 2
    offset = terms.positions[:, None, :] - terms.positions[:, asking, None]
    bias = by_offset[:, offset.clamp(-reach, reach) + reach].transpose(0, 1)
    if terms.untied is not None:
        loose = terms.untied[:, asking, None] | terms.untied[:, None, :]
        bias = bias.masked_fill(loose[:, None], 0.0)
    return bias


def position_scores(terms: PositionTerms, queries: int, scale: float) -> Tensor:
    """The table P: ``(rows, heads, queries, time)``, the meaning of `PositionTerms`.

    Args:
        terms: of ``time`` keys.
        queries: how many of the last tokens ask.
        scale: of dot products.
    """
    rows, time = terms.positions.shape
    scores = terms.to_untied.new_zeros(rows, len(terms.to_untied), queries, time)
    if terms.query is not None and terms.key is not None:
        scores = scores + scale * terms.query[:, :, -queries:] @ terms.key.transpose(-1, -2)
    if terms.by_offset is not None:
        scores = scores + offset_bias(terms, queries)
    if terms.untied is not None:
        to_untied, from_untied = terms.to_untied.view(-1, 1, 1), terms.from_untied.view(-1, 1, 1)
        scores = torch.where(terms.untied[:, None, None, :], to_untied, scores)
        scores = torch.where(terms.untied[:, None, -queries:, None], from_untied, scores)
    return scores


def sight_mask(sight: Sight, queries: int, time: int, device: torch.device) -> Tensor | None:
    """Everything a `Sight` says as one bool tensor ``(batch or 1, 1, queries, time)``, or None."""
    mask = sight.visible
    if sight.valid is not None:
        mask = _both(mask, sight.valid[:, None, None, :])
    if sight.documents is not None:
        documents = sight.documents
        mask = _both(mask, (documents[:, -queries:, None] == documents[:, None, :])[:, None])
    if sight.causal:
        place = torch.arange(time, device=device)
        mask = _both(mask, (place[None, :] <= place[-queries:, None])[None, None])
    return mask


def untied_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: PositionTerms | None,
    *,
    scale: float,
    sight: Sight | None = None,
    dropout: float = 0.0,
    impl: Impl = "auto",
) -> Tensor:
    """Attention whose scores are ``scale q . k`` plus the position terms.

    Args:
        query: ``(batch, heads, queries, dim)``, the last ``queries`` of the keys' tokens.
        key: ``(batch, heads, time, dim)``.
        value: ``(batch, heads, time, value dim)``.
        terms: of the keys' tokens; None for content alone.
        scale: of every dot product; (2 dim)^-1/2 with an untied term.
        sight: what is not seen.
        dropout: of the weights; 0 outside training.
        impl: ``"auto"`` is ``"folded"``.

    Returns:
        ``(batch, heads, queries, value dim)``.

    Raises:
        InputError: if the shapes do not fit or ``impl`` is unknown.
    """
    sight = sight or Sight()
    _check_shapes(query, key, terms)
    if impl == "reference":
        return reference_attention(
            query, key, value, terms, scale=scale, sight=sight, dropout=dropout
        )[0]
    if impl in ("auto", "folded"):
        return _folded(query, key, value, terms, scale, sight, dropout)
    if impl == "flex":
        _check_flex(dropout, query, key, value, *(terms or ()))
        return _flex(query, key, value, terms, scale, sight)
    raise InputError(f"impl must be 'auto', 'reference', 'folded' or 'flex', got {impl!r}")


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: PositionTerms | None,
    *,
    scale: float,
    sight: Sight | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`untied_attention` written out.

    Returns:
        The output and the weights ``(batch, heads, queries, time)`` before dropout. A query that
        sees nothing has weights and an output of zero.
    """
    sight = sight or Sight()
    queries, time = query.shape[2], key.shape[2]
    scores = scale * query @ key.transpose(-1, -2)
    if terms is not None:
        scores = scores + position_scores(terms, queries, scale).to(scores.dtype)
    mask = sight_mask(sight, queries, time, query.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = _softmax(scores, value.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value, weights


def _folded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: PositionTerms | None,
    scale: float,
    sight: Sight,
    dropout: float,
) -> Tensor:
    queries, time = query.shape[2], key.shape[2]
    query, key = fold(query, key, terms, scale, sight)
    causal = sight.causal and queries > 1
    rest = Sight(causal=causal, visible=sight.visible)  # what is not folded
    if _in_blocks(query, terms, sight, dropout):
        return _blocks(query, key, value, terms, scale, rest, dropout)
    mask = sight.visible
    if terms is not None and terms.by_offset is not None:
        bias = terms.shared_bias
        bias = offset_bias(terms, queries) if bias is None else bias[None, :, -queries:]
        seen = sight_mask(rest, queries, time, query.device)
        bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
        mask, causal = bias.to(query.dtype), False
    elif causal and (queries != time or mask is not None):
        mask, causal = sight_mask(rest, queries, time, query.device), False
    # kernels that hold no table of scores want values as wide as keys
    width = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - width))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return output[..., :width]


def _in_blocks(query: Tensor, terms: PositionTerms | None, sight: Sight, dropout: float) -> bool:
    """Whether torch's attention would hold a table of scores for every row of the batch."""
    bias = None if terms is None else terms.by_offset
    if bias is not None and terms is not None and query.shape[0] > 1:
        visible = sight.visible is not None and sight.visible.shape[0] > 1
        if visible or terms.positions.shape[0] > 1:
            return True
    learnt = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return not query.is_cuda and (learnt or dropout > 0)


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: PositionTerms | None,
    scale: float,
    sight: Sight,
    dropout: float,
) -> Tensor:
    """Attention of folded queries and keys, some queries at a time; backward, again so."""
    batch, heads, queries, _ = query.shape
    time = key.shape[2]
    first = time - queries
    most = max(1, _BLOCK // max(1, batch * heads * time))
    size = -(-queries // -(-queries // most))  # all about equally many
    by_offset = None if terms is None else terms.by_offset
    shared = None if terms is None else terms.shared_bias

    def attend(asked: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, begin: int):
        at = slice(first + begin, first + begin + asked.shape[2])
        scores = (asked * scale) @ key.transpose(-1, -2)
        if bias is not None and terms is not None:
            added = bias if shared is not None else _offset_bias(terms, bias, at)
            scores = scores + added.to(scores.dtype)
        visible = sight.visible
        if visible is not None:
            scores = scores.masked_fill(~visible[:, :, begin : begin + asked.shape[2]], -torch.inf)
        if sight.causal:
            place = torch.arange(time, device=asked.device)
            scores = scores.masked_fill(place > place[at, None], -torch.inf)
        return F.dropout(_softmax(scores, value.dtype), dropout, training=dropout > 0) @ value

    asked = query.split(size, dim=2)
    biases: Sequence[Tensor | None] = [by_offset] * len(asked)
    if shared is not None:
        biases = shared[:, -queries:].split(size, dim=1)
    outputs, begin = [], 0
    for one, bias in zip(asked, biases, strict=True):
        outputs.append(
            checkpoint(
                attend, one, key, value, bias, begin,
                use_reentrant=False, preserve_rng_state=dropout > 0,
            )
            if torch.is_grad_enabled()
            else attend(one, key, value, bias, begin)
        )  # fmt: skip
        begin += one.shape[2]
    return torch.cat(outputs, dim=2)


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of scores; a row that sees nothing has none."""
    work = torch.promote_types(scores.dtype, torch.float32)
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0).to(work), dim=-1)
    return weights.masked_fill(empty, 0.0).to(dtype)


def fold(
    query: Tensor, key: Tensor, terms: PositionTerms | None, scale: float, sight: Sight
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain dot product holds the absolute term, padding and documents.

    Args:
        query: ``(batch, heads, queries, dim)``.
        key: ``(batch, heads, time, dim)``.
        terms: positions; the bucket bias is not folded.
        scale: that the attention will multiply dot products with.
        sight: of which ``valid`` and ``documents`` are folded.

    Returns:
        Both with the same, greater width, a multiple of 8 if it grew.
    """
    batch, heads, queries, _ = query.shape
    time = key.shape[2]
    lefts, rights = [query], [key]

    def append(left: Tensor, right: Tensor) -> None:
        lefts.append(left.to(query.dtype).expand(batch, heads, queries, -1))
        rights.append(right.to(query.dtype).expand(batch, heads, time, -1))

    if terms is not None:
        if terms.query is not None and terms.key is not None:
            append(terms.query[:, :, -queries:], terms.key)
        if terms.untied is not None:
            asks = ~terms.untied[:, None, -queries:, None]
            append(asks * (terms.to_untied / scale).view(-1, 1, 1), terms.untied[:, None, :, None])
    hidden = _out_of_sight(query.dtype, scale)
    if sight.valid is not None:
        append(query.new_full((1, 1, 1, 1), hidden), ~sight.valid[:, None, :, None])
    if sight.documents is not None:
        numbers = sight.documents.unique()
        member = sight.documents[:, None, :, None] == numbers
        append(~member[:, :, -queries:] * hidden, member)
    if len(lefts) == 1:
        return query, key
    spare = -sum(part.shape[-1] for part in lefts) % 8
    if spare:
        append(query.new_zeros(1, 1, 1, spare), query.new_zeros(1, 1, 1, spare))
    return torch.cat(lefts, dim=-1), torch.cat(rights, dim=-1)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: PositionTerms | None,
    scale: float,
    sight: Sight,
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    queries, time = query.shape[2], key.shape[2]
    query, key = fold(query, key, terms, scale, sight)
    first = time - queries
    by_offset = None if terms is None else terms.by_offset
    positions = None if terms is None else terms.positions.expand(query.shape[0], -1)
    untied = None if terms is None else terms.untied
    loose = None if untied is None else untied.expand(query.shape[0], -1)
    seen = sight.visible
    if seen is not None:
        seen = seen.expand(query.shape[0], 1, queries, time)

    def modify(score: Tensor, row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if by_offset is not None and positions is not None:
            reach = by_offset.shape[1] // 2
            offset = positions[row, j] - positions[row, i + first]
            added = by_offset[head, offset.clamp(-reach, reach) + reach]
            if loose is not None:
                added = torch.where(loose[row, i + first] | loose[row, j], 0.0, added)
            score = score + added
        if sight.causal:
            score = torch.where(j <= i + first, score, -torch.inf)
        if seen is not None:
            score = torch.where(seen[row, 0, i, j], score, -torch.inf)
        return score

    run = torch.compile(flex_attention, dynamic=False) if query.is_cuda else flex_attention
    return run(query, key, value, score_mod=modify, scale=scale)  # type: ignore[return-value]


def _out_of_sight(dtype: torch.dtype, scale: float) -> float:
    """A coordinate whose score vanishes under any softmax and which the dtype can hold."""
    return -min(1e5 / scale, torch.finfo(dtype).max / 4)


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second


def _check_flex(dropout: float, query: Tensor, *others: Tensor | None) -> None:
    if dropout:
        raise InputError(f"impl 'flex' must have no attention dropout, got {dropout}; use 'folded'")
    learnt = any(part is not None and part.requires_grad for part in (query, *others))
    if learnt and torch.is_grad_enabled() and query.device.type == "cpu":
        raise InputError("impl 'flex' must not learn on a CPU: torch cannot; use 'folded'")


def _check_shapes(query: Tensor, key: Tensor, terms: PositionTerms | None) -> None:
    if query.shape[2] > key.shape[2]:
        raise InputError(
            f"queries must be the last of the keys' tokens, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys"
        )
    if terms is not None and terms.positions.shape[1] != key.shape[2]:
        raise InputError(
            f"position terms must be of as many tokens as there are keys, got "
            f"{terms.positions.shape[1]} and {key.shape[2]}"
        )
    if terms is not None and terms.positions.shape[0] not in (1, key.shape[0]):
        raise InputError(
            f"position terms must be of 1 row or of every row, got {terms.positions.shape[0]} for "
            f"a batch of {key.shape[0]}"
        )
