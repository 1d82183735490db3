"""Laws of batches and the order they are dealt in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.data.streams import DEALS, deal, pack


@given(
    batches=st.integers(1, 40),
    ranks=st.integers(1, 5),
    by=st.sampled_from(DEALS),
    epoch=st.integers(1, 3),
    together=st.integers(1, 5),
    legacy=st.booleans(),
)
@settings(deadline=None)
def test_every_batch_is_read_once(batches, ranks, by, epoch, together, legacy):
    plan = deal(
        batches,
        by=by,
        ranks=ranks * together,
        epoch=epoch,
        ranks_per_stream=together,
        legacy_short_group=legacy,
    )
    assert plan.shape[1] == ranks * together
    assert sorted(plan[plan >= 0]) == list(range(batches))


@given(batches=st.integers(1, 40), ranks=st.integers(1, 5), epoch=st.integers(1, 4))
@settings(deadline=None)
def test_a_step_of_groups_is_one_group(batches, ranks, epoch):
    for step in deal(batches, by="grouped", ranks=ranks, epoch=epoch):
        numbers = step[step >= 0]
        assert numbers[0] % ranks == 0
        assert numbers.tolist() == list(range(numbers[0], numbers[0] + len(numbers)))


def test_streams_go_on_where_they_stopped():
    plan = deal(12, by="streams", ranks=4, ranks_per_stream=2)
    assert plan[:, :2].ravel().tolist() == [0, 1, 2, 3, 4, 5]
    assert plan[:, 2:].ravel().tolist() == [6, 7, 8, 9, 10, 11]
    assert np.array_equal(plan, deal(12, by="streams", ranks=4, ranks_per_stream=2, epoch=9))


def test_epochs_and_seeds_shuffle_anew():
    plans = [deal(30, by="shuffled", epoch=1), deal(30, by="shuffled", epoch=2)]
    assert not np.array_equal(*plans)
    assert np.array_equal(plans[0], deal(30, by="shuffled", epoch=1))
    assert not np.array_equal(plans[0], deal(30, by="shuffled", epoch=1, seed=7))


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    multiple=st.integers(1, 4),
    max_rows=st.none() | st.integers(1, 9),
)
def test_batches_keep_the_order_and_the_budget(sizes, multiple, max_rows):
    order = np.random.default_rng(len(sizes)).permutation(len(sizes))
    batches = pack(sizes, order, max_tokens=24, max_rows=max_rows, multiple=multiple)
    assert [number for batch in batches for number in batch] == order.tolist()
    for batch in batches:
        assert len(batch) * max(sizes[number] for number in batch) <= 24
        assert max_rows is None or len(batch) <= max_rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: deal(3, by="sorted"), "dealt by one of shuffled, grouped, streams, got 'sorted'"),
        (lambda: deal(0, by="shuffled"), "at least one batch to deal, got 0"),
        (lambda: deal(3, by="shuffled", ranks=0), "at least one process, got 0"),
        (
            lambda: deal(3, by="streams", ranks=4, ranks_per_stream=3),
            "multiple of ranks_per_stream, got 4 processes and ranks_per_stream=3",
        ),
        (lambda: pack([5], [0], max_tokens=4), "budget of 4 tokens, but block 0 has 5"),
        (lambda: pack([5], [0], multiple=0), "multiple must be at least 1, got 0"),
        (lambda: pack([5], [0], max_rows=0), "max_rows must be at least 1, got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
