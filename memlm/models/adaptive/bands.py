"""Bands of a vocabulary sorted by frequency: cutoffs (20000, 60000) of 267,744 words make three.

    band 0: words 0 ... 19,999       width d
    band 1: words 20,000 ... 59,999  width d / factor
    band 2: words 60,000 ... end     width d / factor^2

Source: adaptive input representations (Baevski and Auli 2019, section 3).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from memlm.core.config import check


class Band(NamedTuple):
    """Consecutive words that share a width.

    Attributes:
        begin: first word.
        end: one past the last.
        width: of their vectors.
    """

    begin: int
    end: int
    width: int

    @property
    def size(self) -> int:
        """How many words it has."""
        return self.end - self.begin


def make_bands(vocab_size: int, cutoffs: Sequence[int], dim: int, factor: float) -> list[Band]:
    """Cut a vocabulary into bands.

    Args:
        vocab_size: words in all.
        cutoffs: where bands 1, 2, ... begin; the vocabulary's size itself may stand at the end.
        dim: width of band 0.
        factor: by which each band is narrower than the one before.

    Raises:
        InputError: if the cutoffs do not rise inside the vocabulary or a band has no width left.
    """
    inner = list(cutoffs[:-1] if cutoffs and cutoffs[-1] == vocab_size else cutoffs)
    edges = [0, *inner, vocab_size]
    check(
        all(begin < end for begin, end in pairwise(edges)),
        f"cutoffs must rise from above 0 to at most the vocabulary's {vocab_size} words, got "
        f"{list(cutoffs)}",
    )
    bands = [
        Band(begin, end, int(dim // factor**number))
        for number, (begin, end) in enumerate(pairwise(edges))
    ]
    check(
        bands[-1].width >= 1,
        f"every band must keep a width of at least 1, but {len(bands)} bands from width {dim} by "
        f"factor {factor} end with 0; use a smaller factor or fewer cutoffs",
    )
    return bands
