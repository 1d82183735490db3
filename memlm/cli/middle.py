"""Options of every verb that can let an extended model look back at middle tokens."""

from dataclasses import dataclass

from memlm.ops.middle_rule import MiddleConfig


@dataclass(frozen=True, kw_only=True)
class MiddleOptions:
    """Which tokens between the first ones and the window come back."""

    middle: int = 0
    """LM-Infinite: middle tokens that a query sees in each head, those it scores best; 0: none."""
    middle_block: int = MiddleConfig.block
    """LM-Infinite: middle tokens that are selected together; divides --middle."""
    middle_distance: int | None = MiddleConfig.distance
    """LM-Infinite: distance at which middle tokens are scored (default: half the window)."""
    middle_from: int = MiddleConfig.first_layer
    """LM-Infinite: first layer, from 0, that sees middle tokens."""
    middle_to: int | None = MiddleConfig.end_layer
    """LM-Infinite: first layer after it that does not (default: all do)."""
    middle_capacity: int | None = MiddleConfig.capacity
    """LM-Infinite: tokens behind the window from which is selected (default: all)."""
    middle_offload: bool = MiddleConfig.offload
    """LM-Infinite: keep middle tokens in the memory of the CPU."""

    def middle_tokens(self) -> MiddleConfig | None:
        """What was asked for; None: no middle tokens.

        Raises:
            InputError: for values that cannot be.
        """
        if self.middle == 0:
            return None
        return MiddleConfig(
            k=self.middle,
            block=self.middle_block,
            distance=self.middle_distance,
            first_layer=self.middle_from,
            end_layer=self.middle_to,
            capacity=self.middle_capacity,
            offload=self.middle_offload,
        )
