"""Batches: windows of similar length, read by the model side by side.

The composition of every batch is planned from the window table alone, before the first forward
pass: the width to which a window is padded changes the low bits of its hidden states, so a plan
that depended on who reads what would not give the same datastore twice.

Rows are padded on the *right* and there is no attention mask: in a causal model no position sees a
later one, and the padded outputs are never scored. This keeps the fast attention kernels, which a
mask would leave.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import WindowTable

IGNORED = -100
"""The target at every output that is not scored (the convention of torch's cross-entropy)."""


class Batch(NamedTuple):
    """Some windows as tensors.

    Attributes:
        input_ids: ``(rows, width)`` int64, right-padded.
        targets: ``(rows, width)`` int64; ``targets[r, t]`` is the token to predict from the output
            at ``input_ids[r, t]``, -100 where nothing is scored. Flattened row by row, the scored
            ones are each window's ``tokens[first:end]`` in order.
        windows: ``(rows,)`` int64 numbers of the windows in their table.
    """

    input_ids: Tensor
    targets: Tensor
    windows: NDArray[np.int64]


def plan_batches(
    table: WindowTable, *, batch_tokens: int, span: slice | None = None
) -> list[NDArray[np.int64]]:
    """Group windows into batches; the same table, span and size give the same batches.

    Args:
        table: the windows.
        batch_tokens: most padded input tokens in a batch (``rows * width``). A window that is
            longer stands alone.
        span: the windows to cover, e.g. one planned range of a datastore; None: all.

    Returns:
        Window numbers per batch, longest windows first (a batch that does not fit into memory
        fails at once, not at the end). Together they cover every window of the span once.

    Raises:
        InputError: if ``batch_tokens`` is below 1 or the span has a step.
    """
    check(batch_tokens >= 1, f"batch_tokens must be at least 1, got {batch_tokens}")
    check(span is None or span.step in (None, 1), f"a span of windows must have step 1, got {span}")
    start, stop, _ = (span or slice(None)).indices(table.windows)
    widths = table.inputs[start:stop]
    order = np.argsort(-widths, kind="stable")
    batches, place = [], 0
    while place < len(order):
        rows = max(1, batch_tokens // int(widths[order[place]]))
        batches.append(start + order[place : place + rows])
        place += rows
    return batches


def make_batch(
    corpus: TokenCorpus, table: WindowTable, numbers: NDArray[np.int64], pad: int = 0
) -> Batch:
    """The windows ``numbers`` as tensors on the CPU.

    Args:
        corpus: the tokens the table was made from.
        table: the windows.
        numbers: ``(rows,)`` which windows; one batch of ``plan_batches``.
        pad: the id to the right of short windows; any id the model can embed.

    Raises:
        InputError: if no window is asked for.
    """
    numbers = np.asarray(numbers, dtype=np.int64)
    check(numbers.size > 0, "a batch must have at least one window, got none")
    begin, end, first = table.begin[numbers], table.end[numbers], table.first[numbers]
    width = int((end - 1 - begin).max())
    place = begin[:, None] + np.arange(width)
    real = place < end[:, None] - 1
    scored = real & (place >= first[:, None] - 1)
    safe = np.where(real, place, 0)
    input_ids = np.where(real, corpus.tokens[safe], pad).astype(np.int64)
    following = np.minimum(safe + 1, len(corpus) - 1)
    targets = np.where(scored, corpus.tokens[following], IGNORED).astype(np.int64)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(targets), numbers)
