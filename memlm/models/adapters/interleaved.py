"""GPT-J and CodeGen: interleaved rotary embedding of the first dimensions of each head.

Pairs of neighbouring dimensions (2 i, 2 i + 1) turn by ``position / 10000^(2 i / rotary_dim)``; the
dimensions beyond ``rotary_dim`` pass as they are. The original looks its sines up in a table
with a row for each of its positions; here they are computed, because distances have no table.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memlm.models.adapters.attention import AdaptedAttention, split_heads

_BASE = 10000.0


class GptjLambda(AdaptedAttention):
    """GPT-J's attention."""

    def forward(
        self, hidden_states: Tensor, layer_past: Cache | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(batch, time, dim)`` in and out."""
        real = self.real
        query, key, value = (
            split_heads(project(hidden_states), real.num_attention_heads)
            for project in (real.q_proj, real.k_proj, real.v_proj)
        )
        return self.finish(query, key, value, layer_past), None

    def finish(self, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None) -> Tensor:
        """Attention and what follows it."""
        real = self.real
        output = self.attend(
            query,
            key,
            value,
            cache,
            rotate=self.rotate,
            scale=1 / real.scale_attn,
            dropout=real.attn_dropout.p,
        )
        return real.resid_dropout(real.out_proj(output))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model's own rotation of ``(batch, heads, time, dim)``."""
        dim = self.real.rotary_dim or x.shape[-1]
        exponents = torch.arange(0, dim, 2, device=x.device, dtype=torch.float32) / dim
        angles = positions[..., None].float() / _BASE**exponents
        apply = sys.modules[type(self.real).__module__].apply_rotary_pos_emb
        # the model's function has time before heads
        turned = x[..., :dim].transpose(1, 2)
        turned = apply(turned, angles.sin().to(x.dtype), angles.cos().to(x.dtype)).transpose(1, 2)
        return torch.cat([turned, x[..., dim:]], dim=-1)


class CodeGenLambda(GptjLambda):
    """CodeGen's attention: one projection, its outputs in four blocks of query, value and key."""

    def forward(
        self, hidden_states: Tensor, layer_past: Cache | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """``(batch, time, dim)`` in and out."""
        real = self.real
        blocks = real.qkv_proj(hidden_states).unflatten(-1, (4, 3, -1))
        query, value, key = (
            split_heads(blocks[..., part, :].flatten(-2), real.num_attention_heads)
            for part in range(3)
        )
        return self.finish(query, key, value, layer_past), None
