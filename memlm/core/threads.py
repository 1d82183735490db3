"""Thread counts are set for a block of code and given back afterwards, never left changed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from memlm.core.config import check


@contextmanager
def torch_threads(count: int | None) -> Iterator[int]:
    """Run the block with ``count`` intra-op threads (None: unchanged); yields the number in force.

    Raises:
        InputError: if ``count`` is below 1.
    """
    check(count is None or count >= 1, f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield count or before
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def multiply_adds_per_second(count: int | None = None) -> float:
    """What this machine does in float32, by the fastest of a few products of some milliseconds.

    Args:
        count: threads; None: as they are.
    """
    left, right = torch.ones(1024, 256), torch.ones(256, 4096)
    with torch_threads(count):
        out = left @ right  # the first one starts the threads
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            seconds.append(time.perf_counter() - start)
    return 1024 * 256 * 4096 / min(seconds)
