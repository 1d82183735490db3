"""Windows: which tokens the model reads at once, and which of them it is asked to predict.

A model reads a limited number of tokens, so a corpus is cut into windows that overlap: the first
part of a window is only context, the rest is scored. One window is four numbers::

    tokens   . . . [ b  c  c  c | s  s  s  s ) . . .
                     ^ begin      ^ first      ^ end

    the model reads     tokens[begin : end - 1]       (the last token is never an input)
    it predicts         tokens[first : end]           from the outputs at first - 1 ... end - 2

Three rules make windows. All are pure functions of the corpus, so every worker and every resumed
run sees the same ones, in text order: entry i + 1 of a datastore is the next token of the text
wherever the rule predicts every token.

* ``SlidingWindows``: the default. Every token once, a promised amount of context, documents apart.
* ``StrideWindows``: the rule of the knn-transformers scripts, kept for comparison with them.
* ``BlockWindows``: the rule of fairseq's language model evaluation, used by kNN-LM, RetoMaton and
  TRIME.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import Config, check
from memlm.core.errors import InputError
from memlm.data.tokens import TokenCorpus

Integers = NDArray[np.int64]


class WindowTable(NamedTuple):
    """The windows of one corpus, in text order; all arrays are ``(windows,)`` int64.

    Attributes:
        begin: the first input token.
        end: one past the last predicted token; the model reads ``tokens[begin : end - 1]``.
        first: the first predicted token, always after ``begin``.
        document: the document of the first predicted token.
    """

    begin: Integers
    end: Integers
    first: Integers
    document: Integers

    @property
    def windows(self) -> int:
        """How many windows there are (``len`` of a tuple counts its fields)."""
        return len(self.begin)

    @property
    def targets(self) -> Integers:
        """``(windows,)`` how many tokens each window predicts."""
        return self.end - self.first

    @property
    def inputs(self) -> Integers:
        """``(windows,)`` how many tokens the model reads in each window."""
        return self.end - 1 - self.begin


@dataclass(frozen=True)
class SlidingWindows(Config):
    """Every token once, with at least ``length - stride`` tokens of context once there are as many.

    ``length=6, stride=3`` on a document of eleven tokens (c context, s scored)::

        tokens    0 1 2 3 4 5 6 7 8 9 10
        window 0  c s s s s s s             reads 0..5, predicts 1..6
        window 1        c c c c s s s       reads 3..8, predicts 7..9
        window 2          c c c c c c s     reads 4..9, predicts 10

    The first window of a document scores all it can; each later one scores the next ``stride``
    tokens. A window at the end keeps its full length and so gives more context than promised.

    Args:
        length: input tokens of a full window; at most what the model can read.
        stride: tokens scored by each window after the first; a smaller one gives more context and
            costs more time (``length / stride`` forward passes per token).
        cross_documents: treat the corpus as one text: context reaches into earlier documents, and
            every token but the very first of the corpus is predicted. The corpus must then have
            been tokenised with ``begin=False``, as begin tokens are never scored.
    """

    length: int = 512
    stride: int = 256
    cross_documents: bool = False

    def __post_init__(self) -> None:
        check(self.length >= 1, f"length must be at least 1 token, got {self.length}")
        check(
            1 <= self.stride <= self.length,
            f"stride must lie between 1 and length ({self.length}), so that no token is left out, "
            f"got {self.stride}",
        )

    def table(self, corpus: TokenCorpus) -> WindowTable:
        """The windows of ``corpus``.

        Raises:
            InputError: if nothing can be predicted, or begin tokens would be scored.
        """
        if self.cross_documents:
            _refuse_begin_tokens(corpus, "SlidingWindows(cross_documents=True)")
        bounds = np.array([0, len(corpus)]) if self.cross_documents else corpus.offsets
        start, stop = bounds[:-1], bounds[1:]
        predicted = np.maximum(stop - start - 1, 0)
        later = -(-np.maximum(predicted - self.length, 0) // self.stride)
        counts = np.where(predicted > 0, 1 + later, 0)

        start, stop = np.repeat(start, counts), np.repeat(stop, counts)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        reach = start + 1 + self.length + number * self.stride
        end = np.minimum(reach, stop)
        first = np.where(number == 0, start + 1, reach - self.stride)
        begin = np.maximum(end - 1 - self.length, start)
        return _table(corpus, begin, end, first)

    def describe(self) -> str:
        """One line for a protocol."""
        across = "across documents" if self.cross_documents else "within documents"
        return (
            f"sliding windows of {self.length} tokens, stride {self.stride} "
            f"(at least {self.length - self.stride} tokens of context once available), {across}"
        )


@dataclass(frozen=True)
class StrideWindows(Config):
    """The rule of knn-transformers' ``run_clm.py``: strided blocks over groups of raw rows.

    ``block=6, stride=3`` on a group of thirteen tokens, of which the last one is dropped::

        tokens    0 1 2 3 4 5 6 7 8 9 10 11 (12)
        window 0  c s s                           reads 0..1,  predicts 1..2
        window 1  c c c s s s                     reads 0..4,  predicts 3..5
        window 2        c c c s s s               reads 3..7,  predicts 6..8
        window 3              c c c s  s  s       reads 6..10, predicts 9..11

    Documents are the rows of the data set, blank ones included. ``group`` rows are joined (the
    batch size of ``datasets.map``), the rest after the last full block of each group is dropped if
    the group has at least one block, and the first token of a group is never predicted; with
    ``stride == block`` neither is the first token of any block. Context crosses documents.

    The original pads short windows to ``block``; here a window has its own length, which changes
    nothing a causal model computes.

    Args:
        block: tokens in a full window, counting the last one, which is only predicted.
        stride: tokens scored by a window.
        group: rows that are joined.
    """

    block: int = 1024
    stride: int = 512
    group: int = 1000

    def __post_init__(self) -> None:
        check(self.block >= 2, f"block must be at least 2 tokens, got {self.block}")
        check(
            1 <= self.stride <= self.block,
            f"stride must lie between 1 and block ({self.block}), so that no token is left out, "
            f"got {self.stride}",
        )
        check(self.group >= 1, f"group must be at least 1 document, got {self.group}")

    def table(self, corpus: TokenCorpus) -> WindowTable:
        """The windows of ``corpus``, whose documents are the raw rows.

        Raises:
            InputError: if nothing can be predicted, or begin tokens would be scored.
        """
        _refuse_begin_tokens(corpus, "StrideWindows")
        edges = np.append(corpus.offsets[: -1 : self.group], len(corpus))
        parts = []
        for start, stop in pairwise(edges):
            kept = stop - start
            if kept >= self.block:
                kept = kept // self.block * self.block
            place = np.arange(0, kept, self.stride)
            begin = np.maximum(place + self.stride - self.block, 0)
            end = np.minimum(place + self.stride, kept)
            # A label at the first input has nothing before it: the shift of the loss drops it.
            first = np.maximum(place, begin + 1)
            parts.append(start + np.stack([begin, end, first]))
        begin, end, first = np.concatenate(parts, axis=1)
        return _table(corpus, begin, end, first)

    def describe(self) -> str:
        """One line for a protocol."""
        return (
            f"knn-transformers windows of {self.block} tokens, stride {self.stride}, over groups "
            f"of {self.group} documents (remainder of each group dropped), across documents"
        )


@dataclass(frozen=True)
class BlockWindows(Config):
    """fairseq's rule: consecutive blocks to score, each after ``context`` earlier tokens.

    ``block=4, context=3, unit="stream"`` on ten tokens::

        tokens    0 1 2 3 4 5 6 7 8 9
        window 0  c s s s s                 reads 0..3, predicts 1..4
        window 1    c c c c s s s s         reads 1..7, predicts 5..8
        window 2            c c c c s       reads 5..8, predicts 9

    Source: TokenBlockDataset and LMContextWindowDataset (break modes none, complete and eos).
    fairseq puts one end-of-sentence token before the whole corpus; here that is the first token of
    the corpus, which is only context. Lines are documents, each ending with its own eos. Context
    crosses lines. A line that is longer than ``block`` takes its extra length from the context.
    In the original, mode eos without context visits lines sorted by length; here always in order.

    Args:
        block: predicted tokens of a full window (tokens per sample minus context window).
        context: input tokens before the block's own.
        unit: what a block is made of: ``"stream"`` cuts anywhere (none), ``"lines"`` takes as many
            whole lines as fit (complete), ``"line"`` one line each (eos). Begin tokens before
            every document are possible with ``"line"`` only.
    """

    block: int = 512
    context: int = 0
    unit: Literal["stream", "lines", "line"] = "stream"

    def __post_init__(self) -> None:
        check(self.block >= 1, f"block must be at least 1 token, got {self.block}")
        check(self.context >= 0, f"context must not be negative, got {self.context}")
        check(
            self.unit in ("stream", "lines", "line"),
            f"unit must be 'stream', 'lines' or 'line', got {self.unit!r}",
        )

    def table(self, corpus: TokenCorpus) -> WindowTable:
        """The windows of ``corpus``, whose documents are lines.

        Raises:
            InputError: if nothing can be predicted, or begin tokens would be scored.
        """
        if self.unit != "line":
            _refuse_begin_tokens(corpus, f"BlockWindows(unit={self.unit!r})")
        if self.unit == "stream":
            first = np.arange(1, len(corpus), self.block)
            end = np.minimum(first + self.block, len(corpus))
        elif self.unit == "lines":
            edges = self._whole_lines(np.maximum(corpus.offsets, 1))
            first, end = edges[:-1], edges[1:]
        else:
            skipped = 0 if corpus.begin_token is None else 1
            first = np.maximum(corpus.offsets[:-1] + skipped, 1)
            end = corpus.offsets[1:]
        room = np.maximum(self.block + self.context - (end - first), 0)
        before = np.minimum(np.minimum(self.context, room), first - 1)
        return _table(corpus, first - 1 - before, end, first)

    def _whole_lines(self, offsets: Integers) -> Integers:
        """Block edges: whole lines while they fit; a line longer than a block stands alone."""
        edges, line = [offsets[0]], 0
        while line < len(offsets) - 1:
            fitting = int(np.searchsorted(offsets, offsets[line] + self.block, side="right")) - 1
            line = max(fitting, line + 1)
            edges.append(offsets[line])
        return np.array(edges, dtype=np.int64)

    def describe(self) -> str:
        """One line for a protocol."""
        made = {"stream": "of the stream", "lines": "of whole lines", "line": "of one line each"}
        return (
            f"fairseq blocks {made[self.unit]}, {self.block} tokens after {self.context} tokens "
            "of context, across documents"
        )


Windows = SlidingWindows | StrideWindows | BlockWindows

_KINDS = {kind.__name__: kind for kind in (SlidingWindows, StrideWindows, BlockWindows)}


def windows_from_dict(values: Mapping[str, Any]) -> Windows:
    """The rule whose ``to_dict`` is ``values``.

    Raises:
        InputError: if the kind is unknown or the settings are not valid.
    """
    kind = values.get("kind")
    check(
        kind in _KINDS,
        f"the kind of windows must be one of {', '.join(sorted(_KINDS))}, got {kind!r}",
    )
    return _KINDS[str(kind)].from_dict(values)


def _refuse_begin_tokens(corpus: TokenCorpus, rule: str) -> None:
    if corpus.begin_token is not None:
        raise InputError(
            f"{rule} would score the begin token ({corpus.begin_token}) that stands before every "
            "document of this corpus; tokenise with begin=False or use SlidingWindows within "
            "documents"
        )


def _table(corpus: TokenCorpus, begin: Integers, end: Integers, first: Integers) -> WindowTable:
    kept = end > first
    if not kept.any():
        raise InputError(
            "windows must predict at least one token, but no document of this corpus "
            f"({corpus.documents} documents, {len(corpus)} tokens) has one after another; "
            "give more text"
        )
    begin, end, first = (array[kept].astype(np.int64) for array in (begin, end, first))
    return WindowTable(begin, end, first, corpus.document_of(first).astype(np.int64))
