"""MPT and Bloom: ALiBi, a bias of ``- slope * distance`` on every score (Press et al. 2022).

Heads differ in their slope. A sink beyond the window gets the bias of the distance limit, every
other key that of its true distance. The originals add a bias by position of the key alone and
rely on the softmax to cancel the rest, which holds for true distances only; here distances
are taken as they are.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from memlm.models.adapters.attention import AdaptedAttention, split_heads


class MptLambda(AdaptedAttention):
    """MPT's attention."""

    def __init__(self, real: nn.Module):
        super().__init__(real)
        build = sys.modules[type(real).__module__].build_mpt_alibi_tensor
        self.slopes = one_step(build(self.real.n_heads, 2))

    def forward(
        self, hidden_states: Tensor, past_key_values: Cache | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(batch, time, dim)`` in and out."""
        real = self.real
        mixed = real.Wqkv(hidden_states)
        if real.clip_qkv:
            mixed = mixed.clamp(min=-real.clip_qkv, max=real.clip_qkv)
        query, key, value = (split_heads(part, real.n_heads) for part in mixed.chunk(3, dim=-1))
        output = self.attend(
            query,
            key,
            value,
            past_key_values,
            slopes=self.slopes,
            scale=real.softmax_scale,
            dropout=real.attn_dropout_p,
        )
        return real.out_proj(output), None


class BloomLambda(AdaptedAttention):
    """Bloom's attention; it adds the residual itself."""

    def __init__(self, real: nn.Module):
        super().__init__(real)
        build = sys.modules[type(real).__module__].build_alibi_tensor
        self.slopes = one_step(build(torch.ones(1, 2), self.real.num_heads, torch.float32))

    def forward(
        self, hidden_states: Tensor, residual: Tensor, layer_past: Cache | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(batch, time, dim)`` in and out."""
        real = self.real
        mixed = split_heads(real.query_key_value(hidden_states), real.num_heads)
        query, key, value = mixed.chunk(3, dim=-1)
        output = self.attend(
            query,
            key,
            value,
            layer_past,
            slopes=self.slopes,
            scale=real.inv_norm_factor,
            dropout=real.attention_dropout.p,
        )
        output = functional.dropout(real.dense(output), real.hidden_dropout, self.training)
        return residual + output, None


def one_step(bias: Tensor) -> Tensor:
    """``(heads,)``: the slopes, read off a model's own bias ``(heads, 1, 2)`` for two positions."""
    return (bias[..., 1] - bias[..., 0]).flatten().float()
