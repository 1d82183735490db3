"""Cutting a stream of sentences into samples of at most ``size`` tokens.

    "none"          every ``size`` tokens, through sentences
    "complete"      whole sentences while they fit; one that is longer makes a block of its own
    "complete_doc"  the same, and a sentence of one token ends the document and is dropped, as are
                    blocks of one token
    "eos"           one sentence each

(The break modes of fairseq, which RoBERTa and TUPE are trained with: TUPE with "complete" and a
begin token before every block.)
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check

Break = Literal["none", "complete", "complete_doc", "eos"]
_DOCUMENT_END = 1  # tokens of a sentence that only marks the end of a document


class Blocks(NamedTuple):
    """Where blocks are in the stream of all tokens.

    Attributes:
        slices: ``(blocks, 2)`` int64, first token and the one after the last.
        sentences: ``(blocks, 3)`` int64: first sentence, where in it the block begins, last
            sentence.
    """

    slices: NDArray[np.int64]
    sentences: NDArray[np.int64]


def cut_blocks(lengths: NDArray[np.integer], size: int, mode: Break = "complete") -> Blocks:
    """Cut sentences into blocks.

    Args:
        lengths: ``(sentences,)`` tokens of each.
        size: of a block.
        mode: where blocks may end.

    Raises:
        InputError: if ``size`` is below 1 or ``mode`` unknown.
    """
    check(size >= 1, f"size must be at least 1, got {size}")
    check(
        mode in ("none", "complete", "complete_doc", "eos"),
        f"mode must be 'none', 'complete', 'complete_doc' or 'eos', got {mode!r}",
    )
    lengths = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    if mode == "none":
        starts = np.arange(0, total, size)
        slices = np.stack([starts, np.minimum(starts + size, total)], axis=1)
    elif mode == "eos":
        slices = np.stack([ends - lengths, ends], axis=1)
    else:
        slices = np.array(_whole(lengths, size, documents=mode == "complete_doc"), dtype=np.int64)
        slices = slices.reshape(-1, 2)
    first = np.searchsorted(ends, slices[:, 0], side="right")
    last = np.searchsorted(ends, slices[:, 1] - 1, side="right")
    offset = slices[:, 0] - (ends - lengths)[first] if len(slices) else first
    return Blocks(slices, np.stack([first, offset, last], axis=1))


def _whole(lengths: NDArray[np.int64], size: int, *, documents: bool) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    begin = at = 0

    def close() -> None:
        if at - begin > (1 if documents else 0):
            found.append((begin, at))

    for length in lengths.tolist():
        border = documents and length == _DOCUMENT_END
        if border or (at > begin and at - begin + length > size):
            close()
            begin = at
        if border:
            begin += length
        at += length
    close()
    return found
