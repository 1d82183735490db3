"""The cache layer of an extended model that looks back: sinks and ring, and middle tokens.

All that `WindowLayer` does, with a `MiddleStore` that is cropped, copied and reordered along with
it. The device holds a constant number of keys if the store is offloaded or has a capacity.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.models.middle_store import MiddleStore
from memlm.models.window_cache import SPARE, WindowLayer
from memlm.ops.lambda_rule import Keys, LambdaConfig
from memlm.ops.middle_rule import MiddleConfig
from memlm.ops.window_attention import Impl


class MiddleLayer(WindowLayer):
    """Sinks, ring and middle tokens of one attention layer.

    Attributes:
        middle: which middle tokens are seen and where they are kept.
        store: of them.
    """

    is_compileable = False  # the store grows, and what is selected lies anywhere

    def __init__(self, config: LambdaConfig, middle: MiddleConfig):
        super().__init__(config)
        self.middle = middle
        self.store = MiddleStore(middle, config, SPARE + 1)

    def attend(self, query: Tensor, new: Keys, impl: Impl = "auto", **how: Any) -> Tensor:
        """As ``WindowLayer.attend``, and over the middle tokens that each query selects."""
        other = self.store.attend(query, new, **how)
        beside = {} if other is None else {"other": other}
        return super().attend(query, new, impl, **how, **beside)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.store = MiddleStore(self.middle, self.config, SPARE + 1)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, which are no padding in any row."""
        super().crop(tokens_to_remove)
        if self.store.is_begun:
            self.store.crop(-tokens_to_remove)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        if self.store.is_begun:
            self.store.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies beside each other."""
        super().batch_repeat_interleave(repeats)
        if self.store.is_begun:
            rows = torch.arange(len(self.store.lengths))
            self.store.select_rows(rows.repeat_interleave(repeats))
