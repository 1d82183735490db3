"""Scoring whole windows of text at once, for memories that hold keys densely.

An evaluation reads text in windows: some positions are context only, the others are scored. All
hidden states of a window are known before the memory is asked, so a memory of dense keys need not
walk from position to position: one call answers all scored positions, in matrix products.

A memory that can do this has

    windowed                                              whether it can, with its settings
    score_window(window, state) -> (partial, state)       rows are windows side by side, one of each
                                                          text; the state goes on to the next ones

beside the methods of a `TokenMemory`. `LocalMemory`, `LongMemory` and `Together` have it; what they
answer is what they would answer walking through the same windows.

Source: TRIME (Zhong et al. 2022, section 5.1). Differs from its code: only scored positions ask,
and windows of many texts are scored side by side.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.types import Bank, TargetPartial
from memlm.ops.bank import Places, Visibility, bank_lse


class Window(NamedTuple):
    """Windows of several texts, side by side, padded on the right.

    Attributes:
        keys: ``(rows, width, dim)`` tap states at the inputs.
        tokens: ``(rows, width)`` int64, what follows each input.
        real: ``(rows, width)`` bool, False on padding.
        scored: ``(rows, width)`` bool, True where ``tokens`` is to be scored: the last real ones.
        first: the first column that is scored in any row.
    """

    keys: Tensor
    tokens: Tensor
    real: Tensor
    scored: Tensor
    first: int

    @property
    def targets(self) -> Tensor:
        """``(scored,)`` int64, row by row."""
        return self.tokens[self.scored]


def is_windowed(memory: Any) -> bool:
    """Whether a memory scores whole windows."""
    return bool(getattr(memory, "windowed", False))


def score_bank(
    window: Window,
    keys: Tensor,
    tokens: Tensor,
    real: Tensor,
    key_places: Places,
    query_places: Places,
    visibility: Visibility,
    temperature: float,
) -> TargetPartial:
    """What one bank per row says about the row's scored tokens.

    Args:
        window: whose scored tokens are asked for.
        keys: ``(rows, entries, dim)`` of the banks.
        tokens: ``(rows, entries)`` int64, what followed them.
        real: ``(rows, entries)`` bool, False where there is no entry.
        key_places: of the entries.
        query_places: of the columns from ``window.first`` on.
        visibility: who sees whom.
        temperature: divides the dot products.

    Returns:
        ``(scored,)``, row by row.
    """
    columns = slice(window.first, None)
    stream = torch.where(real, key_places.stream, -1)
    bank = Bank(keys, tokens, stream, key_places.document, key_places.position)
    partial = bank_lse(
        window.keys[:, columns],
        bank,
        window.tokens[:, columns],
        query_places,
        visibility,
        scale=1 / temperature,
    )
    asked = window.scored[:, columns]
    return TargetPartial(partial.lse[asked], partial.target_lse[asked])
