"""The parts RETRO's encoder and decoder are made of: norms, rotary positions, attention, residuals.

    RMSNorm     gain * x / max(rms(x), 1e-8)              gated: times sigmoid(w * x)
    rotary      channels (i, i + R/2) of the first R turned by position * theta^(-2i/R)
    residual    x + F(norm(x))        or, norms behind,   norm(scale * x + F(x))

Attention is torch's scaled-dot-product attention throughout; queries, keys and values have no bias,
the output has one. A query that may see no key at all attends to all of them alike and means
nothing, but is never NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from memlm.models.retro.config import RetroConfig


class Rotation(NamedTuple):
    """Cosines and sines ``(..., time, R/2)`` of positions."""

    cosine: Tensor
    sine: Tensor


def rotation(positions: Tensor, config: RetroConfig, dtype: torch.dtype) -> Rotation:
    """What turns queries or keys at integer ``positions`` (Su et al. 2021); float32 at least."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    width = config.rotary_dim or config.head_dim
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    angles = positions.to(exact)[..., None] * config.rope_theta ** (-pairs / width)
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, turn: Rotation | None) -> Tensor:
    """Turn the first channels of ``x`` ``(..., time, dim)``; the rest stays."""
    if turn is None:
        return x
    half = turn.cosine.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (
        first * turn.cosine - second * turn.sine,
        second * turn.cosine + first * turn.sine,
    )
    return torch.cat([*turned, rest], dim=-1)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add: 0, or one so low that it swallows any score but is finite."""
    lowest = max(torch.finfo(dtype).min, -1e38)  # finite in bfloat16 too, which rounds float32's
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest)


class RetroNorm(nn.Module):
    """RMSNorm with its clamp outside the root, optionally gated (as in the published package)."""

    def __init__(self, width: int, *, gated: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.gate = nn.Parameter(torch.ones(width)) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to the same."""
        size = x.norm(dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        normed = x / size.clamp(min=1e-8) * self.weight
        return normed if self.gate is None else normed * torch.sigmoid(x * self.gate)


def make_norm(config: RetroConfig, width: int) -> nn.Module:
    """The norm that ``config.norm`` names."""
    if config.norm == "layer":
        return nn.LayerNorm(width)
    return RetroNorm(width, gated=config.norm == "gated_rms")


class BodyLinear(nn.Linear):
    """A linear layer of encoder or decoder, with its gain in DeepNet's initialisation."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0):
        super().__init__(inputs, outputs, bias=bias)
        self.gain = gain


class RetroAttention(nn.Module):
    """Multi-head attention of some vectors to others, or to themselves.

    Args:
        width: of the queries' side and of the output.
        context: width of what is attended to.
        heads: number of heads.
        head_dim: width of a head.
        dropout: on the weights.
        gain: see `BodyLinear`.
    """

    def __init__(
        self, width: int, context: int, heads: int, head_dim: int, dropout: float, gain: float = 1.0
    ):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        inner = heads * head_dim
        self.query = BodyLinear(width, inner, bias=False)
        self.key = BodyLinear(context, inner, bias=False)
        self.value = BodyLinear(context, inner, bias=False, gain=gain)
        self.output = BodyLinear(inner, width, gain=gain)

    @property
    def dropout_now(self) -> float:
        """Dropout of this forward pass."""
        return self.dropout if self.training else 0.0

    def queries(self, x: Tensor, turn: Rotation | None) -> Tensor:
        """``(batch, time, width)`` to ``(batch, heads, time, head_dim)``, rotated."""
        return rotate(self.split(self.query(x)), turn)

    def keys_values(self, context: Tensor, turn: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of ``(batch, time, context)``, each with heads in front."""
        return rotate(self.split(self.key(context)), turn), self.split(self.value(context))

    def split(self, x: Tensor) -> Tensor:
        """Heads become a dimension in front of time."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
    ) -> Tensor:
        """Attention with heads apart, joined and projected: ``(batch, time, width)``.

        Args:
            query: ``(batch, heads, queries, dim)``.
            key: ``(batch, heads, keys, dim)``.
            value: alike.
            mask: to add, broadcastable to ``(batch, heads, queries, keys)``; see `additive`.
            causal: query i sees keys 0 to i.
        """
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.dropout_now, is_causal=causal
        )
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int, inner: int, dropout: float, gain: float = 1.0):
        super().__init__()
        self.expand = BodyLinear(width, inner, gain=gain)
        self.contract = BodyLinear(inner, width, gain=gain)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width)`` to the same."""
        return self.contract(F.dropout(F.gelu(self.expand(x)), self.dropout, self.training))


class Residual(GradientCheckpointingLayer):
    """A sub-layer with its norm and residual sum; the unit of gradient checkpointing.

    Args:
        inner: the sub-layer; called with the (normed) input and whatever else is given.
        norm: of the sub-layer's input, or of the sum.
        norm_first: which of the two.
        scale: of x in the sum.
    """

    def __init__(self, inner: nn.Module, norm: nn.Module, *, norm_first: bool, scale: float):
        super().__init__()
        self.inner = inner
        self.norm = norm
        self.norm_first = norm_first
        self.scale = scale

    def forward(self, x: Tensor, *arguments: object) -> Tensor:
        """``(..., width)`` to the same."""
        if self.norm_first:
            return x + self.inner(self.norm(x), *arguments)
        return self.norm(self.scale * x + self.inner(x, *arguments))

    def passed(self, x: Tensor) -> Tensor:
        """The same for a sub-layer that adds nothing."""
        return x if self.norm_first else self.norm(self.scale * x)
