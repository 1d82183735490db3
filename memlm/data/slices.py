"""A part of a corpus: some of its documents, cut to a length, and a stretch of their tokens.

In this order: documents ``start`` to ``start + count``; of each at most ``length`` tokens, what is
too many cut off on one side; of what is left the tokens ``first`` to ``first + tokens``. Begin
tokens are context and do not count; a document that loses its beginning keeps its begin token.

Source: the loaders of LM-Infinite (Han et al. 2024), which slice documents and truncate them on
the left, on the right or in the centre. Differs from them: the begin token is never cut off.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from memlm.core.config import check
from memlm.data.tokens import TokenCorpus

Side = Literal["left", "right", "center"]


def truncate(tokens: Sequence[int], length: int | None, side: Side = "right") -> list[int]:
    """At most ``length`` tokens.

    Args:
        tokens: of one text.
        length: None: all.
        side: what is cut off: ``"right"`` keeps the first tokens, ``"left"`` the last, ``"center"``
            the first ``length // 2`` and as many of the last as are missing.

    Raises:
        InputError: for a length below 1 or an unknown side.
    """
    check(length is None or length >= 1, f"a text must keep at least 1 token, got {length}")
    check(side in ("left", "right", "center"), f"side must be left, right or center, got {side!r}")
    if length is None or len(tokens) <= length:
        return list(tokens)
    if side == "right":
        return list(tokens[:length])
    first = length // 2 if side == "center" else 0
    return [*tokens[:first], *tokens[len(tokens) - (length - first) :]]


def slice_corpus(
    corpus: TokenCorpus,
    *,
    start: int = 0,
    count: int | None = None,
    length: int | None = None,
    side: Side = "right",
    first: int = 0,
    tokens: int | None = None,
) -> TokenCorpus:
    """A part of a corpus.

    Args:
        corpus: the whole.
        start: documents to leave out at the beginning.
        count: documents to take; None: all.
        length: tokens kept of each; None: all.
        side: what is cut off from longer ones, see ``truncate``.
        first: tokens to leave out at the beginning of what is left.
        tokens: to take; None: all.

    Returns:
        A corpus of the documents that still have tokens; their sizes in bytes and words are
        unknown as soon as one was cut.

    Raises:
        InputError: if nothing is left, or a number is negative.
    """
    for name, number in (("start", start), ("first", first)):
        check(number >= 0, f"{name} must not be negative, got {number}")
    for name, number in (("count", count), ("tokens", tokens)):
        check(number is None or number >= 1, f"{name} must be at least 1, got {number}")
    begin = [] if corpus.begin_token is None else [corpus.begin_token]
    stop = corpus.documents if count is None else min(start + count, corpus.documents)
    spans = list(pairwise(corpus.offsets.tolist()))
    skip, room, kept, cut, numbers = first, tokens, [], False, []
    for number in range(start, stop):
        a, b = spans[number]
        whole = corpus.tokens[min(a + len(begin), b) : b].tolist()
        part = truncate(whole, length, side)[skip:] if whole else whole
        skip = max(0, skip - (min(len(whole), length) if length else len(whole)))
        part = part if room is None else part[:room]
        room = None if room is None else room - len(part)
        if part:
            kept.append(begin + part)
            numbers.append(number)
            cut |= len(part) < len(whole)
    check(
        bool(kept),
        f"the part of a corpus must have tokens, got none from document {start} and token {first} "
        f"on; the corpus has {corpus.documents} documents with {len(corpus)} tokens",
    )
    sizes = {
        name: None if cut or values is None else values[numbers]
        for name, values in (
            ("text_bytes", corpus.text_bytes),
            ("text_words", corpus.text_words),
            ("text_characters", corpus.text_characters),
        )
    }
    return TokenCorpus(
        tokens=np.concatenate([np.asarray(row, np.int32) for row in kept]),
        offsets=np.cumsum([0, *map(len, kept)], dtype=np.int64),
        names=tuple(corpus.names[number] for number in numbers),
        begin_token=corpus.begin_token,
        **sizes,
    )
