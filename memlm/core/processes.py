"""Several processes of one command, as ``torchrun`` starts them.

Work is dealt like cards: item i belongs to process i modulo their number. What was computed is
gathered on all of them, so every process ends with the same result, and only the first one writes.
The numbers travel through the processors' memory (gloo), whatever the models run on.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from memlm.core.errors import InputError


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and of how many; (0, 1) without process group."""
    # who has not loaded torch has no process group
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def launched() -> int:
    """How many processes a launcher such as ``torchrun`` started; 1 without."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def gather(value: Any) -> list[Any]:
    """What every process holds, in their order; plain values and arrays."""
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


@contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that a launcher started, for the block; nothing happens without one.

    Raises:
        InputError: if the launcher did not say how the processes find each other.
    """
    if launched() == 1 or rank_and_size()[1] > 1:
        yield
        return
    import torch.distributed as dist

    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE={launched()} says that there are several processes, but they cannot be "
            f"joined ({error}); start them with torchrun, or leave WORLD_SIZE unset"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def refuse_several(what: str) -> None:
    """Refuse to be started several times over.

    Raises:
        InputError: if a launcher started several processes.
    """
    if launched() > 1:
        raise InputError(
            f"{what} runs in one process, but a launcher started {launched()}; run it without "
            "torchrun"
        )
