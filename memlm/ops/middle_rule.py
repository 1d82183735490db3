"""Which middle tokens a query sees: those that have left the window and are no sinks.

LM-Infinite (Han et al. 2024) lets a query look back at the few middle tokens that it scores
highest, all at one familiar distance P. Middle token j scores ``a_j = <R(P) q_i, k_j> * scale`` for
query i; each head takes its own best, and a_j are also their scores under the one softmax that they
share with window and sinks.

Here tokens are taken in blocks of consecutive positions, counted from the last sink, because a
block has context, and scoring blocks is cheaper than scoring tokens. A block is scored by the
largest dot product that keys within its bounds can have (Quest, Tang et al. 2024):

    bound(q, block) = sum_d max(q_d * high_d, q_d * low_d)     high, low: over the keys of the block

With blocks of one token this is the token's own score, and the selection is the paper's. What is
selected depends on the query and the tokens before it alone, so later tokens change nothing, and a
text read at once, in pieces or token by token gives the same.

Differs from the paper's code: there only the last query of each forward pass sees middle tokens,
which makes the result depend on how the text is cut (``rule="last"``). It needs at least k of them,
or takes none; ``rule="every"`` takes what is there.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from memlm.core.config import Config, check

Selects = Literal["every", "last"]


@dataclass(frozen=True)
class MiddleConfig(Config):
    """How many middle tokens come back, where, and where they are kept.

    Attributes:
        k: middle tokens that a query sees in each head, a multiple of ``block``; 0: none.
        block: tokens that are selected together; 1: each by itself, as in the paper; at most the
            window.
        distance: P, at which they are scored; None: half the window, as the paper's code has it.
        first_layer: number of the first layer, from 0, in which they are seen; the paper's code: 4.
        end_layer: number of the first layer after it in which they are not; None: to the end.
        rule: ``"every"`` query selects, or the ``"last"`` one of each forward pass in every row.
        capacity: tokens behind the window that a query can select from; None: all. A cache needs
            memory for so many.
        offload: keep them in the memory of the CPU; only what is selected goes to the device.
    """

    k: int
    block: int = 16
    distance: int | None = None
    first_layer: int = 4
    end_layer: int | None = None
    rule: Selects = "every"
    capacity: int | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        check(self.k >= 0, f"k must not be negative, got {self.k}")
        check(self.block >= 1, f"block must be at least 1, got {self.block}")
        check(
            self.k % self.block == 0,
            f"k must be a multiple of the {self.block} tokens of a block, got {self.k}; give "
            "another k, or block=1 to select single tokens",
        )
        check(
            self.distance is None or self.distance >= 0,
            f"distance must be None or not negative, got {self.distance}",
        )
        check(
            self.first_layer >= 0 and (self.end_layer is None or self.first_layer < self.end_layer),
            "there must be a layer from first_layer up to end_layer, got "
            f"{self.first_layer} and {self.end_layer}",
        )
        check(self.rule in get_args(Selects), f"rule must be 'every' or 'last', got {self.rule!r}")
        check(
            self.capacity is None or self.capacity >= max(1, self.k),
            f"capacity must be None, or at least 1 and k, got {self.capacity} with k={self.k}",
        )

    def describe(self) -> str:
        """A few words of protocol."""
        far = "half the window" if self.distance is None else str(self.distance)
        last = "the last" if self.end_layer is None else str(self.end_layer - 1)
        of = "" if self.capacity is None else f" of the {self.capacity} behind the window"
        return (
            f"{self.k} middle tokens{of} in blocks of {self.block} for {self.rule} query, at "
            f"distance {far}, in layers {self.first_layer} to {last}"
        )

    def layers(self, count: int) -> range:
        """Numbers of the layers, of ``count``, in which middle tokens are seen."""
        return range(count)[self.first_layer : self.end_layer]
