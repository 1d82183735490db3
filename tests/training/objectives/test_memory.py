"""What training memories say, against the plainest loops there are."""

import pytest
import torch
import torch.distributed as dist

from memlm.testing.processes import run_processes
from memlm.training.objectives.gather import gather_entries
from memlm.training.objectives.memory import (
    Positions,
    external_memory,
    local_memory,
    long_memory,
)

ROWS, TIME, DIM = 4, 5, 3


def make(rows=ROWS, padded=True):
    generator = torch.Generator().manual_seed(5)
    keys = torch.randn(rows, TIME, DIM, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 4, (rows, TIME), generator=generator)
    if padded:
        targets[1, 3:] = targets[-1, 0] = -100
    return Positions(keys.requires_grad_(), targets)


def by_loops(batch, sees, temperature=1.0):
    """``(2, rows, time)`` masses, one query and key at a time."""
    rows, time = batch.targets.shape
    every = [(row, place) for row in range(rows) for place in range(time)]
    masses = torch.full((2, rows, time), -torch.inf, dtype=torch.float64)
    for query in every:
        for key in every:
            if batch.targets[key] == -100 or not sees(query, key):
                continue
            score = batch.keys[query] @ batch.keys[key] / DIM**0.5 / temperature
            masses[0][query] = torch.logaddexp(masses[0][query], score)
            if batch.targets[key] == batch.targets[query]:
                masses[1][query] = torch.logaddexp(masses[1][query], score)
    return masses


def assert_same(partial, masses, targets):
    real = targets != -100
    torch.testing.assert_close(torch.stack(partial)[:, real], masses[:, real], rtol=0, atol=1e-12)


def earlier(query, key):
    return key[0] == query[0] and key[1] < query[1]


def test_local():
    batch = make()
    with torch.no_grad():
        assert_same(
            local_memory(batch, temperature=2.0), by_loops(batch, earlier, 2.0), batch.targets
        )


def test_local_keeps_inside_documents():
    batch, document = make(), torch.arange(TIME).expand(ROWS, TIME) // 2
    with torch.no_grad():
        masses = by_loops(
            batch, lambda query, key: earlier(query, key) and query[1] // 2 == key[1] // 2
        )
        assert_same(local_memory(batch, document=document), masses, batch.targets)


def test_long():
    batch = make()
    with torch.no_grad():
        assert_same(
            long_memory(batch), by_loops(batch, lambda query, key: key < query), batch.targets
        )


def test_long_with_streams_and_positions_of_ones_own():
    batch = make()
    stream = torch.tensor([0, 7, 0, 7])[:, None].expand(ROWS, TIME)
    position = torch.arange(ROWS * TIME).flip(0).view(ROWS, TIME)  # later rows come first
    with torch.no_grad():
        masses = by_loops(batch, lambda query, key: key > query and (query[0] - key[0]) % 2 == 0)
        partial = long_memory(batch, stream=stream, position=position)
        assert_same(partial, masses, batch.targets)


@pytest.mark.parametrize("hide_own", [False, True])
def test_external(hide_own):
    batch = make()

    def sees(query, key):
        return query[0] != key[0] or (not hide_own and earlier(query, key))

    with torch.no_grad():
        assert_same(external_memory(batch, hide_own=hide_own), by_loops(batch, sees), batch.targets)


def test_external_does_not_depend_on_the_order_of_other_rows():
    batch = make()
    order = torch.tensor([0, 3, 1, 2])
    twin = Positions(batch.keys[order], batch.targets[order])
    before, after = external_memory(batch), external_memory(twin)
    torch.testing.assert_close(before.lse[0], after.lse[0])


@pytest.mark.parametrize("memory", [local_memory, long_memory])
def test_causal_memories_do_not_see_the_future(memory):
    batch = make(padded=False)
    twin = Positions(batch.keys.detach().clone(), batch.targets.clone())
    twin.keys[2, 3:] += 1
    twin.targets[2, 3:] = 0
    before, after = memory(batch), memory(twin)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:2], other[:2])
        assert torch.equal(one[2, :3], other[2, :3])
    assert not torch.equal(before.lse[2, 4], after.lse[2, 4])


# -- several processes ---------------------------------------------------------------------------


def share(memory, batch, ragged, settings):
    """The masses of this process's rows and the gradient of their keys."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    time = TIME - rank if ragged else TIME
    keys = batch.keys[rows, :time].detach().requires_grad_()
    targets = batch.targets[rows, :time]
    partial = memory(Positions(keys, targets), **settings)
    total(partial, targets).backward()
    return torch.stack(partial).detach(), keys.grad


def total(partial, targets):
    masses = torch.stack(partial)[:, targets != -100]
    return torch.logaddexp(masses, torch.zeros_like(masses)).sum()


CASES = {
    "long": (long_memory, {"ranks_per_stream": 4}, {}),
    "external": (external_memory, {}, {}),
    "hidden": (external_memory, {"hide_own": True}, {"hide_own": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ragged", [False, True])
def test_many_processes_say_what_one_says(case, ragged):
    memory, settings, alone = CASES[case]
    whole = make()
    if ragged:  # process r has r positions less in each row: padding to the one that has all
        targets = whole.targets.clone()
        for rank in range(ROWS):
            targets[rank, TIME - rank :] = -100
        whole = Positions(whole.keys, targets)
    partial = memory(whole, **alone)
    total(partial, whole.targets).backward()
    detached = Positions(whole.keys.detach(), whole.targets)
    for rank, (masses, grad) in enumerate(
        run_processes(share, ROWS, memory, detached, ragged, settings)
    ):
        time = TIME - rank if ragged else TIME
        real = whole.targets[rank, :time] != -100
        expected = torch.stack(partial)[:, rank, :time].detach()
        torch.testing.assert_close(masses[:, 0][:, real], expected[:, real], rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[0], whole.keys.grad[rank, :time], rtol=0, atol=1e-12)


def gathered(count, detach_remote):
    rank = dist.get_rank()
    keys = torch.full((count[rank], 2), float(rank + 1), requires_grad=True)
    fields = torch.full((count[rank], 1), rank)
    parts = gather_entries(keys, fields, detach_remote=detach_remote)
    sum((part * (other + 1)).sum() for other, (part, _) in enumerate(parts)).backward()
    return [part.tolist() for part, _ in parts], [f.tolist() for _, f in parts], keys.grad


@pytest.mark.parametrize("detach_remote", [False, True])
def test_short_processes_are_filled_up_and_gradients_are_summed(detach_remote):
    for rank, (keys, fields, grad) in enumerate(run_processes(gathered, 2, [3, 1], detach_remote)):
        assert keys == [[[1.0, 1.0]] * 3, [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]]
        assert fields == [[[0]] * 3, [[1], [-1], [-1]]]
        users = 1 if detach_remote else 2
        assert torch.equal(grad, torch.full_like(grad, users * (rank + 1)))
