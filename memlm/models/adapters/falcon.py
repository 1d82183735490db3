"""Falcon: one attention module for rotary and ALiBi models, with one, few or many key heads.

ALiBi here is scaled like the scores, ``(q k - slope * distance) / sqrt(dim)``, and its slopes are
rounded to bfloat16, as they were in training. The original rounds also their products with the
positions, so that beyond 256 tokens its biases are a little off; here they are not.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from memlm.models.adapters.alibi import one_step
from memlm.models.adapters.attention import AdaptedAttention
from memlm.models.running import EXTENDED


class FalconLambda(AdaptedAttention):
    """Falcon's attention."""

    def __init__(self, real: nn.Module):
        super().__init__(real)
        build = sys.modules[type(real).__module__].build_alibi_tensor
        bias = build(torch.ones(1, 2), self.real.num_heads, torch.float32)
        self.slopes = one_step(bias) * self.real.inv_norm_factor

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        layer_past: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``(batch, time, dim)`` in and out."""
        real = self.real
        how: dict[str, Any] = {"scale": real.inv_norm_factor}
        if alibi is None:
            how["rotate"] = getattr(self, EXTENDED).rotation(self)
        else:
            how |= {"slopes": self.slopes, "dropout": real.attention_dropout.p}
        query, key, value = self.split(real.query_key_value(hidden_states))
        return real.dense(self.attend(query, key, value, layer_past, **how)), None

    def split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of query heads, each followed by its key head and its value head."""
        groups = self.real.num_kv_heads
        parts = mixed.unflatten(-1, (groups, -1, self.real.head_dim))
        query = parts[..., :-2, :].flatten(2, 3)
        return (
            query.transpose(1, 2),
            parts[..., -2, :].transpose(1, 2),
            parts[..., -1, :].transpose(1, 2),
        )
