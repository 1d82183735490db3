"""Which examples a micro-batch holds, on which process: a function of their numbers alone.

Micro-batch b is counted from the first step of the run, over accumulation and epochs. Nothing else
decides, no state and no random generator, so a resumed run goes on with the very examples that come
next, and processes never disagree.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.data.streams import Deal, deal


class Order(Protocol):
    """Decides which examples are read."""

    def items(self, batch: int, process: int) -> Sequence[int]:
        """Numbers of the examples of a micro-batch on a process; none: it has nothing to read."""
        ...


class InTurn(NamedTuple):
    """0, 1, 2, ... without end: for examples that know epochs themselves.

    Attributes:
        rows: examples of a micro-batch on one process.
        processes: how many there are; they take turns.
    """

    rows: int
    processes: int = 1

    def items(self, batch: int, process: int) -> Sequence[int]:
        """Numbers of the examples of a micro-batch on a process."""
        first = (batch * self.processes + process) * self.rows
        return range(first, first + self.rows)


class Dealt:
    """Planned batches, dealt anew in every epoch (`memlm.data.streams`).

    Args:
        batches: numbers of the examples of each, as `memlm.data.streams.pack` makes them.
        by: ``"shuffled"``; ``"grouped"`` for trime_ext; ``"streams"`` for trime_long.
        processes: how many there are.
        seed: of the shuffling.
        ranks_per_stream: processes that read one stream together.

    Raises:
        InputError: if there are no batches or processes do not make whole streams.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[int]],
        *,
        by: Deal = "shuffled",
        processes: int = 1,
        seed: int = 1,
        ranks_per_stream: int = 1,
    ):
        check(len(batches) >= 1, "there must be at least one training example, got none")
        self.batches, self.processes, self.seed = batches, processes, seed
        self.by: Deal = by
        self.ranks_per_stream = ranks_per_stream
        self._plan = 1, self._dealt(1)

    @property
    def epoch_batches(self) -> int:
        """Micro-batches of an epoch on every process."""
        return len(self._plan[1])

    def items(self, batch: int, process: int) -> Sequence[int]:
        """Numbers of the examples of a micro-batch on a process; none: it has nothing to read."""
        passed, step = divmod(batch, self.epoch_batches)
        if self._plan[0] != passed + 1:
            self._plan = passed + 1, self._dealt(passed + 1)
        number = int(self._plan[1][step, process])
        return self.batches[number] if number >= 0 else ()

    def _dealt(self, epoch: int) -> NDArray[np.int64]:
        return deal(
            len(self.batches),
            by=self.by,
            ranks=self.processes,
            seed=self.seed,
            epoch=epoch,
            ranks_per_stream=self.ranks_per_stream,
        )
