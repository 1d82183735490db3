import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.ops.topk import merge_topk, ordered_topk


def by_sorting(scores, k, ids):
    rows = [
        sorted(zip((-s for s in row), own, strict=True))[:k]
        for row, own in zip(scores.tolist(), ids.tolist(), strict=True)
    ]
    return [[-s for s, _ in row] for row in rows], [[i for _, i in row] for row in rows]


tied_scores = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, float("-inf")]), min_size=9, max_size=9),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(rows=tied_scores, k=st.integers(1, 12), order=st.permutations(range(9)), wide=st.booleans())
def test_equals_a_sort_whatever_ties(rows, k, order, wide):
    scores, ids = torch.tensor(rows), torch.tensor(order) * 10
    got_scores, got_ids = ordered_topk(scores, k, ids.expand_as(scores) if wide else ids)
    want_scores, want_ids = by_sorting(scores, k, ids.expand_as(scores))
    assert got_scores.tolist() == want_scores
    assert got_ids.tolist() == want_ids


@settings(deadline=None)
@given(rows=tied_scores, k=st.integers(1, 9), cut=st.integers(1, 8))
def test_shards_give_the_same_as_the_whole(rows, k, cut):
    scores = torch.tensor(rows)
    columns = torch.arange(9)
    parts = [ordered_topk(scores[:, s], k, columns[s]) for s in (slice(cut), slice(cut, None))]
    whole = ordered_topk(scores, k)
    for merged in (merge_topk(parts, k), merge_topk(parts[::-1], k)):
        assert torch.equal(merged[0], whole[0])
        assert torch.equal(merged[1], whole[1])


def test_random_scores_equal_torch():
    scores = torch.randn(20, 500)
    values, columns = ordered_topk(scores, 37)
    expected = torch.topk(scores, 37)
    assert torch.equal(values, expected.values)
    assert torch.equal(columns, expected.indices)


def test_k_must_be_positive():
    with pytest.raises(InputError, match="k must be at least 1, got 0"):
        ordered_topk(torch.zeros(1, 3), 0)
