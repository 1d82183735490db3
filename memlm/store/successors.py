"""Which entry follows which: i + 1 is the next token of the text, until the text breaks off."""

import torch
from torch import Tensor


def next_entries(
    entries: int, documents: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """The successor of every entry: the next one, unless the text breaks off between them.

    Args:
        entries: how many.
        documents: ``(entries,)`` document of each; a successor is of the same one. None: all are.
        positions: ``(entries,)`` place in the document; a successor stands right behind.

    Returns:
        ``(entries,)`` int32 (int64 for huge stores), -1 where there is none.
    """
    dtype = torch.int32 if entries <= torch.iinfo(torch.int32).max else torch.int64
    successors = torch.arange(1, entries + 1, dtype=dtype)
    successors[-1:] = -1
    if documents is not None:
        successors[:-1][documents[1:] != documents[:-1]] = -1
    if positions is not None:
        successors[:-1][positions[1:] != positions[:-1] + 1] = -1
    return successors
