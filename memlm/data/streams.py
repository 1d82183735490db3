"""Which process reads which block of text at which step: batches, and the order they are dealt in.

Training text is cut into numbered blocks. `pack` joins consecutive blocks of an order into batches
under a budget of tokens; `deal` says which batch every process reads at every step of an epoch:

    "shuffled"  any batch anywhere: plain training, TRIME's local memory
    "grouped"   batches that stand beside each other are read in one step; the groups are shuffled:
                TRIME's external memory, where similar text stands together (`data.lexical`)
    "streams"   the text in its order, cut into as many streams as there are groups of
                ``ranks_per_stream`` processes; a stream's processes read consecutive batches in one
                step: TRIME's long-term memory

Draws depend on seed and epoch alone, so a resumed run continues with the same batches. All plans
are NumPy arrays of numbers; -1 is a process without a batch at the end of an epoch.

Source: TRIME (Zhong et al. 2022, section 4), whose batches fairseq deals in just these orders.
Differs from it: the last group, if it is short, comes last, so that the groups after it stay whole.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check

Deal = Literal["shuffled", "grouped", "streams"]
DEALS: tuple[Deal, ...] = ("shuffled", "grouped", "streams")


def pack(
    sizes: Sequence[int] | NDArray[np.integer],
    order: Sequence[int] | NDArray[np.integer],
    *,
    max_tokens: int | None = None,
    max_rows: int | None = None,
    multiple: int = 1,
) -> list[list[int]]:
    """Batches of consecutive blocks of an order, as large as the budget allows.

    Args:
        sizes: ``(blocks,)`` tokens of each block.
        order: numbers of the blocks, as they shall be read.
        max_tokens: most padded tokens (rows times longest row) of a batch; None: no limit.
        max_rows: most rows; None: no limit.
        multiple: rows are a multiple of this where the budget allows more rows than that.

    Returns:
        Numbers of the blocks of each batch; all of ``order``, in its order.

    Raises:
        InputError: if a block alone is over the budget, or a number is out of range.
    """
    check(multiple >= 1, f"multiple must be at least 1, got {multiple}")
    check(max_rows is None or max_rows >= 1, f"max_rows must be at least 1, got {max_rows}")
    batches: list[list[int]] = []
    batch: list[int] = []
    lengths: list[int] = []
    for number in map(int, order):
        size = int(sizes[number])
        check(
            max_tokens is None or size <= max_tokens,
            f"a block must fit the budget of {max_tokens} tokens, but block {number} has {size}; "
            "raise max_tokens or cut shorter blocks",
        )
        longest = max([size, *lengths])
        over = max_tokens is not None and (len(batch) + 1) * longest > max_tokens
        if batch and (over or len(batch) == max_rows):
            rows = max(len(batch) // multiple * multiple, len(batch) % multiple)
            batches.append(batch[:rows])
            batch, lengths = batch[rows:], lengths[rows:]
        batch.append(number)
        lengths.append(size)
    return [*batches, batch] if batch else batches


def deal(
    batches: int,
    *,
    by: Deal,
    ranks: int = 1,
    seed: int = 1,
    epoch: int = 1,
    ranks_per_stream: int = 1,
    legacy_short_group: bool = False,
) -> NDArray[np.int64]:
    """Which batch every process reads at every step of an epoch.

    Args:
        batches: how many there are.
        by: the order; see the module.
        ranks: processes.
        seed: of the shuffling.
        epoch: from 1; shuffles anew, except by streams.
        ranks_per_stream: processes that read one stream together; by streams only.
        legacy_short_group: fairseq's grouping, which shuffles a short last group like the others,
            so that the steps after it mix two groups.

    Returns:
        ``(steps, ranks)`` int64 numbers of batches, each once; -1 where there is none left.

    Raises:
        InputError: if a number is out of range.
    """
    check(by in DEALS, f"batches are dealt by one of {', '.join(DEALS)}, got {by!r}")
    check(batches >= 1, f"there must be at least one batch to deal, got {batches}")
    check(ranks >= 1, f"there must be at least one process, got {ranks}")
    if by == "streams":
        return _streams(batches, ranks, ranks_per_stream)
    numbers = np.arange(batches)
    draw = np.random.RandomState(seed + epoch)
    if by == "shuffled":
        draw.shuffle(numbers)
        return _in_turn(numbers, ranks)
    groups = -(-batches // ranks)
    order = np.arange(groups)
    draw.shuffle(order)
    if not legacy_short_group and batches % ranks:
        order = np.append(order[order != groups - 1], groups - 1)
    return _in_turn(
        np.concatenate([numbers[group * ranks : (group + 1) * ranks] for group in order]), ranks
    )


def _streams(batches: int, ranks: int, together: int) -> NDArray[np.int64]:
    check(
        together >= 1 and ranks % together == 0,
        "the number of processes must be a multiple of ranks_per_stream, got "
        f"{ranks} processes and ranks_per_stream={together}",
    )
    streams = ranks // together
    length = -(-batches // streams)
    steps = -(-length // together)
    plan = np.full((steps, ranks), -1, np.int64)
    for stream in range(streams):
        own = np.arange(stream * length, min((stream + 1) * length, batches))
        dealt = _in_turn(own, together)
        plan[: len(dealt), stream * together : (stream + 1) * together] = dealt
    return plan


def _in_turn(numbers: NDArray[np.integer], ranks: int) -> NDArray[np.int64]:
    """Row by row: process r reads every ``ranks``-th batch."""
    plan = np.full((-(-len(numbers) // ranks), ranks), -1, np.int64)
    plan.reshape(-1)[: len(numbers)] = numbers
    return plan
