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


def multiply_adds_per_second(
    count: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """What a device does, by the fastest of a few products of some milliseconds.

    Args:
        count: CPU threads; None: as they are.
        device: where.
        dtype: of the numbers.
    """
    size = 1024
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    with torch_threads(count):
        for _ in range(5):
            start = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
    return size**3 / best
