"""Position ids for padded and packed rows."""

import torch
from torch import Tensor

from memlm.core.errors import InputError


def position_ids_of(valid: Tensor, documents: Tensor | None = None) -> Tensor:
    """Positions counted over real tokens, anew in every document.

    Args:
        valid: ``(batch, time)`` bool or 0/1, False for padding on either side.
        documents: ``(batch, time)`` int64, the number of the document a token is of; the tokens of
            one document stand together. None: one document per row.

    Returns:
        ``(batch, time)`` int64. Padding gets 0 before and the last position after the real tokens.
    """
    counted = valid.long().cumsum(-1)
    if documents is None:
        return (counted - 1).clamp(min=0)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    before = torch.where(starts, counted - valid.long(), 0).cummax(-1).values
    return (counted - before - 1).clamp(min=0)


def check_padding(valid: Tensor) -> None:
    """Raise unless every row has a real token and padding, if any, is on the right.

    Args:
        valid: ``(batch, time)`` bool.

    Raises:
        InputError: for an empty batch, a row of padding, or padding on the left.
    """
    if valid.numel() == 0:
        raise InputError(f"the batch must hold tokens, got shape {tuple(valid.shape)}")
    empty = (~valid.any(-1)).nonzero()
    if len(empty):
        raise InputError(
            f"every sample must have a real token, but sample {int(empty[0])} has no non-pad token"
        )
    if not bool(valid[:, 0].all()):
        raise InputError("left padding detected; pass position_ids or right-pad")
