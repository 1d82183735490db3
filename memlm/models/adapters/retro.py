"""RETRO's decoder: the model's own rotary positions, through Lambda attention.

Only self-attention changes. Chunks are counted along the whole text, and a token reads the
neighbours of its chunk, however little of the text it still sees. The body counts them by its
attention mask, so it gets the one that was given.
"""

from torch import Tensor

from memlm.models.adapters.attention import AdaptedAttention
from memlm.models.retro.decoder import Sight
from memlm.models.retro.layers import rotate, rotation


class RetroLambda(AdaptedAttention):
    """RETRO's causal self-attention."""

    needs_mask = True

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """``(batch, time, width)`` in and out."""
        real = self.real
        key, value = real.keys_values(x, None)
        output = self.attend(
            real.queries(x, None),
            key,
            value,
            sight.cache,
            rotate=self.rotate,
            scale=real.config.head_dim**-0.5,
            dropout=real.dropout,
        )
        return real.output(output)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model's own rotation of ``(batch, heads, time, dim)``."""
        return rotate(x, rotation(positions[:, None], self.real.config, x.dtype))
