"""The part that every adapter shares: the weights of the original, and the way to Lambda attention.

An adapter has the original's very tables of parameters, buffers and submodules, so that training,
saving and moving between devices see the names they always saw. Only ``forward`` is another one: it
projects as the original does and leaves everything between projections to Lambda attention.
"""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from memlm.models.running import EXTENDED


class AdaptedAttention(nn.Module):
    """Another forward pass over the weights of ``real``.

    Attributes:
        real: the module that was replaced; not a submodule.
        needs_mask: whether the body reads the attention mask for more than its attention.
    """

    real: Any
    needs_mask = False

    def __init__(self, real: nn.Module):
        super().__init__()
        self._parameters = real._parameters
        self._buffers = real._buffers
        self._non_persistent_buffers_set = real._non_persistent_buffers_set
        self._modules = real._modules
        self.training = real.training
        # as an ordinary attribute: a submodule would change the names of all weights
        object.__setattr__(self, "real", real)
        self.layer_idx: int = real.layer_idx  # type: ignore[assignment]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: Cache | None, **how: Any
    ) -> Tensor:
        """Lambda attention over ``(batch, heads, time, dim)``, neither rotated nor biased.

        Args:
            query: of the new tokens.
            key: of the new tokens.
            value: of the new tokens.
            cache: takes the new keys and gives those it keeps.
            how: rotation, slopes and scale, as `memlm.ops.window_attention.window_attention` takes
                them, and the ``dropout`` of the original.

        Returns:
            ``(batch, time, heads * dim)``.
        """
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output = getattr(self, EXTENDED).attend(self, query, key, value, **how)
        return output.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``(batch, time, heads * dim)`` to ``(batch, heads, time, dim)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
