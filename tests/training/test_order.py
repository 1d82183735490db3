"""Orders: every example once per epoch, streams read on, groups stay together."""

from hypothesis import given
from hypothesis import strategies as st

from memlm.training.order import Dealt, InTurn


@given(
    batches=st.integers(1, 23),
    processes=st.integers(1, 4),
    by=st.sampled_from(["shuffled", "grouped", "streams"]),
    rows=st.integers(1, 3),
)
def test_an_epoch_reads_every_example_once_whatever_came_before(batches, processes, by, rows):
    planned = [range(first * rows, (first + 1) * rows) for first in range(batches)]
    order = Dealt(planned, by=by, processes=processes)
    asked_out_of_order = Dealt(planned, by=by, processes=processes)
    for epoch in (2, 0):
        read = [
            number
            for step in range(order.epoch_batches)
            for process in range(processes)
            for number in order.items(epoch * order.epoch_batches + step, process)
        ]
        assert sorted(read) == list(range(batches * rows))
        first = epoch * order.epoch_batches
        assert order.items(first, 0) == asked_out_of_order.items(first, 0)


def test_processes_take_turns():
    order = InTurn(rows=2, processes=3)
    read = [list(order.items(batch, process)) for batch in range(2) for process in range(3)]
    assert read == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_a_streams_processes_read_consecutive_batches():
    planned = [(number,) for number in range(8)]
    order = Dealt(planned, by="streams", processes=4, ranks_per_stream=2)
    read = [[order.items(batch, process)[0] for process in range(4)] for batch in range(3)]
    assert read == [[0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 4, 5]]


def test_neighbours_of_a_chain_stay_together():
    planned = [(number,) for number in range(12)]
    order = Dealt(planned, by="grouped", processes=3, seed=2)
    seen = []
    for batch in range(order.epoch_batches):
        group = [order.items(batch, process)[0] for process in range(3)]
        assert group == list(range(group[0], group[0] + 3))
        seen.append(group[0])
    assert sorted(seen) == [0, 3, 6, 9] != seen
