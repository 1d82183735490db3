"""Laws of the greedy merge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.index.exact import ExactIndex
from memlm.index.greedy import greedy_merge, nearest_entries
from memlm.index.keys import TensorKeys


def merged(entries: int, k: int, kinds: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randn(entries, 3, generator=draw)
    values = torch.randint(0, kinds, (entries,), generator=draw)
    near = nearest_entries(ExactIndex(keys), TensorKeys(keys), k + 1, quiet=True)
    return values, near, greedy_merge(values, near, k, seed=seed)


@settings(max_examples=40, deadline=None)
@given(
    entries=st.integers(1, 60),
    k=st.integers(1, 9),
    kinds=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_laws(entries, k, kinds, seed):
    values, near, merge = merged(entries, k, kinds, seed)
    assert int(merge.weights.sum()) == entries
    assert torch.equal(values[merge.parent], values)
    assert torch.equal(merge.parent[merge.parent], merge.parent)  # stars: depth one
    assert (merge.weights[merge.parent] > 0).all()
    absorbed = merge.parent != torch.arange(entries)
    assert (merge.weights[absorbed] == 0).all()
    survivors = merge.survivors
    assert torch.equal(merge.parent[survivors], survivors)
    for entry in absorbed.nonzero().squeeze(-1).tolist():
        assert entry in near[merge.parent[entry], : k + 1]


def test_clusters_are_the_stars():
    _, _, merge = merged(60, 4, 2, seed=1)
    clusters = merge.clusters()
    alone = (merge.weights == 1).nonzero().squeeze(-1)
    assert (clusters.cluster_of[alone] == -1).all()
    for star in range(len(clusters)):
        members = clusters.members[clusters.offsets[star] : clusters.offsets[star + 1]].long()
        assert len(merge.parent[members].unique()) == 1
        assert len(members) == int(merge.weights[merge.parent[members[0]]])


def test_missing_neighbours_are_no_entries():
    values = torch.zeros(3, dtype=torch.long)
    near = torch.tensor([[0, -1], [1, -1], [2, -1]])
    assert greedy_merge(values, near, 1).weights.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 2}, r"neighbours must be \(3, 3 or more\) to merge 2 of them"),
        ({"order": torch.tensor([0, 0, 1])}, "order must name each of the 3 entries once"),
    ],
)
def test_bad_inputs(change, message):
    settings = {"k": 1, **change}
    with pytest.raises(InputError, match=message):
        greedy_merge(torch.zeros(3).long(), torch.zeros(3, 2).long(), **settings)
