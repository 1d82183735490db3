"""Untied positions as a part: learned position vectors become score terms for any attention.

    W = LayerNorm(rows of P)        pq = W U_Q + b_Q        pk = W U_K + b_K
    theta_1 = s pq_row0 . pk_row0 (+ r_16)     theta_2 = s pq_row1 . pk_row1 (+ r_32)
    a token at position i uses row i + 1

(Ke et al. 2021, section 3; the layout of the rows is that of the authors' code.) The terms are made
once per forward pass and shared by all layers; in evaluation they are kept until the weights or the
length change (an edit through ``.data`` is seen after the next ``train()`` or ``eval()``).
Positions need not be column numbers: give ``position_ids`` for packed documents, left padding or
permuted tokens, and ``untied`` for the tokens that see no positions (default: those at position 0).

Where it differs from the paper: U_Q and U_K have bias vectors, the position vectors a LayerNorm,
and theta_1, theta_2 also hold a bucket bias each (the code resets both terms, the paper their sum);
same functions, and what published weights need. theta_1 is a constant over a whole row of scores,
so it changes no output and gets no gradient; it is kept so that checkpoints go round.

Lengths beyond the trained positions are an error unless ``extension`` says what to do:
``"interpolate"`` spreads the trained rows of positions 1 .. P-1 over the new length, ``"clip"``
gives every later token the last trained row. Buckets saturate and need nothing.
"""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.ops.untied_attention import PositionTerms
from memlm.ops.untied_attention import offset_bias as _offset_bias
from memlm.positions.buckets import check_buckets, relative_buckets
from memlm.positions.scheme import PositionScheme

Extension = Literal["error", "interpolate", "clip"]


class UntiedPositions(nn.Module):
    """Makes the position terms of a scheme. Weights are N(0, 0.02), as the authors' are.

    Args:
        hidden_size: of the position vectors, ``heads * head width``.
        heads: of the attention.
        scheme: which terms there are; with absolute ``"added"`` only the buckets are made here.
        max_positions: trained positions P; there are P + 1 rows.
        bidirectional: False for causal attention: all buckets are for the past.
        num_buckets: of the relative part.
        max_distance: of the relative part.
        layer_norm_eps: of the LayerNorm on the rows.
        extension: what to do beyond ``max_positions``.

    Raises:
        InputError: if the sizes do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        scheme: PositionScheme,
        *,
        max_positions: int = 512,
        bidirectional: bool = True,
        num_buckets: int = 32,
        max_distance: int = 128,
        layer_norm_eps: float = 1e-5,
        extension: Extension = "error",
    ):
        super().__init__()
        check_heads(hidden_size, heads)
        check_extension(extension)
        check(
            scheme.relative or scheme.absolute in ("untied", "crossed"),
            f"the scheme must have a term of its own, got {scheme.name!r}; add its positions to "
            "the embeddings instead",
        )
        self.scheme = scheme
        self.heads = heads
        self.max_positions = max_positions
        self.bidirectional = bidirectional
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.extension = extension
        self.scale = (scheme.terms * (hidden_size // heads)) ** -0.5
        if scheme.absolute in ("untied", "crossed"):
            self.positions = nn.Embedding(max_positions + 1, hidden_size)
            self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
            self.query = nn.Linear(hidden_size, hidden_size)
            self.key = nn.Linear(hidden_size, hidden_size)
        if scheme.relative:
            check_buckets(num_buckets, max_distance, bidirectional=bidirectional)
            self.relative = nn.Embedding(num_buckets + int(scheme.reset), heads)
        self._kept: dict[str, tuple[Any, Any]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def train(self, mode: bool = True) -> "UntiedPositions":
        """As of any module; terms that were kept are made anew."""
        self._kept.clear()
        return super().train(mode)

    def forward(
        self,
        length: int,
        *,
        position_ids: Tensor | None = None,
        untied: Tensor | None = None,
    ) -> PositionTerms:
        """The terms of ``length`` tokens.

        Args:
            length: number of tokens (of keys, when decoding).
            position_ids: ``(batch or 1, length)`` int64; default 0, 1, 2, ...
            untied: ``(batch or 1, length)`` bool, tokens without positions; default those at
                position 0. Read only if the scheme resets.

        Returns:
            Terms for `untied_attention` with ``scale=self.scale``.

        Raises:
            InputError: if a position exceeds ``max_positions`` and ``extension`` is ``"error"``, or
                the shapes do not fit.
        """
        if position_ids is None and untied is None:
            return self._keep("terms", length, lambda: self._terms(length, None, None))
        return self._terms(length, position_ids, untied)

    def _terms(
        self, length: int, position_ids: Tensor | None, untied: Tensor | None
    ) -> PositionTerms:
        weight = next(self.parameters())
        if position_ids is None:
            positions = torch.arange(length, device=weight.device)[None]
            longest = length
        else:
            _check_ids("position_ids", position_ids, length)
            positions = position_ids
            longest = int(positions.max()) + 1 if positions.numel() else 0
            check(
                positions.numel() == 0 or int(positions.min()) >= 0,
                "position_ids must not be negative",
            )
        loose = None
        if self.scheme.reset:
            loose = positions == 0 if untied is None else untied
            _check_ids("untied", loose, length)
            if loose.shape[0] != positions.shape[0]:
                rows = max(loose.shape[0], positions.shape[0])
                loose, positions = loose.expand(rows, -1), positions.expand(rows, -1)
        theta_1, theta_2 = weight.new_zeros(self.heads), weight.new_zeros(self.heads)
        query = key = None
        if hasattr(self, "positions"):
            projected = self._projected(longest)
            index = positions.clamp(max=projected.last) + 1
            query, key = projected.query[:, index], projected.key[:, index]
            query, key = query.transpose(0, 1), key.transpose(0, 1)
            if loose is not None:
                at = loose[:, None, :, None]
                query, key = query.masked_fill(at, 0.0), key.masked_fill(at, 0.0)
                dots = self.scale * (projected.query[:, :2] * projected.key[:, :2]).sum(-1)
                theta_1, theta_2 = dots[:, 0], dots[:, 1]
        by_offset = None
        if self.scheme.relative:
            reach = torch.arange(-self.max_distance, self.max_distance + 1, device=weight.device)
            by_offset = self.relative.weight[self._buckets(reach)].T
            if loose is not None:
                theta_2 = theta_2 + self.relative.weight[self.num_buckets]
                if self.bidirectional:
                    theta_1 = theta_1 + self.relative.weight[self.num_buckets // 2]
        terms = PositionTerms(query, key, positions, loose, theta_1, theta_2, by_offset, None)
        if by_offset is not None and positions.shape[0] == 1:
            terms = terms._replace(shared_bias=_offset_bias(terms, length)[0])
        return terms

    def _buckets(self, offsets: Tensor) -> Tensor:
        return relative_buckets(
            offsets,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )

    def _projected(self, longest: int) -> "_Projected":
        """Projected rows for positions below ``longest``, and the two rows before them."""
        trained = self.max_positions
        if longest > trained and self.extension == "error":
            raise InputError(
                f"sequence length {longest} exceeds max_positions {trained}; pass "
                "position_extension='interpolate' or 'clip'"
            )
        stretched = longest > trained and self.extension == "interpolate"
        # while nothing is learnt, one table serves every length
        needed = trained if not self._learning() else min(longest, trained)
        return self._keep(
            "projected",
            longest if stretched else needed,
            lambda: self._project(longest if stretched else needed),
        )

    def _project(self, longest: int) -> "_Projected":
        rows = self.positions.weight
        if longest > self.max_positions:
            rows = torch.cat([rows[:2], _spread(rows[2:], longest - 1)])
        else:
            rows = rows[: max(longest, 1) + 1]
        rows = self.layer_norm(rows)
        query, key = self.query(rows), self.key(rows)
        # (rows, heads * dim) -> (heads, rows, dim)
        return _Projected(
            query.unflatten(-1, (self.heads, -1)).transpose(0, 1),
            key.unflatten(-1, (self.heads, -1)).transpose(0, 1),
            len(rows) - 2,
        )

    def _learning(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def _keep(self, name: str, length: int, make: Any) -> Any:
        """In evaluation, what ``make`` made last, while length, weights and dtype are the same."""
        weights = list(self.parameters())
        if (
            torch.compiler.is_compiling()  # first: a compiled graph cannot ask what comes last
            or self.training
            or self._learning()
            or any(weight.is_inference() for weight in weights)  # such have no versions
        ):
            self._kept.clear()
            return make()
        state = tuple((weight.data_ptr(), weight._version, weight.dtype) for weight in weights)
        mark = (length, torch.is_inference_mode_enabled(), weights[0].device, state)
        if name not in self._kept or self._kept[name][0] != mark:
            self._kept[name] = mark, make()
        return self._kept[name][1]

    def extra_repr(self) -> str:
        """The scheme and the trained positions, for printing."""
        return f"scheme={self.scheme.name!r}, max_positions={self.max_positions}"


class _Projected(NamedTuple):
    """Rows ready for use, ``(heads, rows, dim)``, and the greatest position that has one."""

    query: Tensor
    key: Tensor
    last: int


def check_heads(hidden_size: int, heads: int) -> None:
    """Raise ``InputError`` unless the width splits into heads."""
    check(
        heads > 0 and hidden_size % heads == 0,
        f"hidden_size must be divisible by the number of heads, got {hidden_size} and {heads}",
    )


def check_extension(extension: str) -> None:
    """Raise ``InputError`` for an unknown way beyond the trained positions."""
    check(
        extension in get_args(Extension),
        f"extension must be 'error', 'interpolate' or 'clip', got {extension!r}",
    )


def _spread(rows: Tensor, length: int) -> Tensor:
    """``length`` rows linearly interpolated between the given ones, first and last kept."""
    if len(rows) < 2:
        return rows.expand(length, -1)
    place = torch.linspace(0, len(rows) - 1, length, device=rows.device, dtype=torch.float32)
    left = place.floor().long().clamp(max=len(rows) - 2)
    share = (place - left).to(rows.dtype)[:, None]
    return rows[left] * (1 - share) + rows[left + 1] * share


def _check_ids(name: str, ids: Tensor, length: int) -> None:
    check(
        ids.dim() == 2 and ids.shape[1] == length,
        f"{name} must be (batch, {length}), got {tuple(ids.shape)}",
    )
