"""Operations on padded rows of entries against loops over lists."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.index.partition import Clusters
from memlm.memory.pointers import (
    check_successors,
    cluster_table,
    compact,
    contains,
    first_copies,
    follow,
    members,
    table,
)

ENTRIES = 30
entry = st.integers(-1, ENTRIES - 1)


def matrices(element, rows=(1, 4), width=(0, 12)):
    return st.tuples(st.integers(*rows), st.integers(*width)).flatmap(
        lambda shape: st.lists(
            st.lists(element, min_size=shape[1], max_size=shape[1]),
            min_size=shape[0],
            max_size=shape[0],
        )
    )


def tensor(rows):
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)


def listed(rows):
    return [[int(x) for x in row if x >= 0] for row in rows]


@given(matrices(entry))
def test_first_copies(rows):
    got = first_copies(tensor(rows))
    for row, mask in zip(rows, got, strict=True):
        kept = [x for x, keep in zip(row, mask.tolist(), strict=True) if keep]
        assert kept == list(dict.fromkeys(x for x in row if x >= 0))


@given(matrices(entry), matrices(entry))
def test_contains(pool, values):
    rows = min(len(pool), len(values))
    pool, values = pool[:rows], values[:rows]
    got = contains(tensor(pool), tensor(values)).tolist()
    for some, wanted, mask in zip(pool, values, got, strict=True):
        assert mask == [x in some for x in wanted]


@given(matrices(st.tuples(entry, st.integers(0, 3), st.booleans())))
def test_follow_keeps_the_best_first(rows):
    entries = tensor([[x for x, _, _ in row] for row in rows])
    scores = tensor([[s for _, s, _ in row] for row in rows]).double()
    keep = tensor([[k for _, _, k in row] for row in rows]).bool()
    successors = table(torch.arange(ENTRIES).flip(0), torch.device("cpu"))
    keep &= entries >= 0
    got = listed(follow(entries, scores, keep, successors))
    for row, pointers in zip(rows, got, strict=True):
        kept = sorted((pair for pair in row if pair[2] and pair[0] >= 0), key=lambda p: -p[1])
        assert pointers == [ENTRIES - 1 - x for x, _, _ in kept]


@given(matrices(st.tuples(entry, st.booleans())))
def test_compact(rows):
    entries = tensor([[x for x, _ in row] for row in rows])
    keep = tensor([[k for _, k in row] for row in rows]).bool()
    left, twice = compact(keep, entries, entries * 2, fill=(-9, -9))
    counts = keep.sum(1).tolist()
    assert left.shape[1] == max(counts)
    for row, got, count, double in zip(rows, left, counts, twice, strict=True):
        assert got[:count].tolist() == [x for x, k in row if k]
        assert (got[count:] == -9).all()
        assert double[:count].tolist() == [2 * x for x, k in row if k]


@settings(deadline=None)
@given(matrices(entry), st.integers(0, 6), st.integers(1, 40), st.integers(0, 99))
def test_members_of_the_most_hit_clusters_come_first(rows, count, most, seed):
    draw = random.Random(seed)
    cluster_of = [draw.randrange(-1, count) for _ in range(ENTRIES)]
    clusters = Clusters.from_assignment(torch.tensor(cluster_of), count)
    got = members(tensor(rows), cluster_table(clusters, torch.device("cpu")), most)
    for row, mine in zip(rows, got, strict=True):
        hits = Counter(cluster_of[x] for x in row if x >= 0)
        hits.pop(-1, None)
        expected = []
        for cluster in sorted(hits, key=lambda c: (-hits[c], c)):
            expected += [x for x in range(ENTRIES) if cluster_of[x] == cluster]
        assert [x for x in mine.tolist() if x >= 0] == expected[:most]


@pytest.mark.parametrize(
    "successors",
    [torch.arange(5), torch.arange(1, 7), torch.full((6,), -2), torch.zeros(6)],
    ids=["too few", "too high", "too low", "no integers"],
)
def test_bad_successors(successors):
    with pytest.raises(InputError, match="successors must be"):
        check_successors(successors, 6)
