"""Greedy merge against the original, `greedy_merge.py`."""

import re

import numpy as np
import pytest
import torch

from memlm.index.greedy import greedy_merge


@pytest.fixture
def merges(golden_retomaton_greedy_merge):
    """The merges of one case: k and the arrays."""
    files = sorted(golden_retomaton_greedy_merge.glob("merge_k*.npz"))
    assert files
    return [(int(re.findall(r"\d+", file.stem)[-1]), np.load(file)) for file in files]


def test_the_same_entries_are_absorbed_by_the_same(merges):
    for k, golden in merges:
        merge = greedy_merge(
            torch.from_numpy(golden["vals"]).reshape(-1),
            torch.from_numpy(golden["retrieval"]),
            k,
            order=torch.from_numpy(golden["order"]).long(),
        )
        np.testing.assert_array_equal(merge.weights.numpy(), golden["weights_full"])
        survivor, absorbed = golden["absorbed"].T
        np.testing.assert_array_equal(merge.parent[absorbed.astype(np.int64)].numpy(), survivor)
        kept = merge.survivors
        np.testing.assert_array_equal(merge.weights[kept].numpy(), golden["new_weights"])
        np.testing.assert_array_equal(golden["keys"][kept], golden["new_keys"])
        np.testing.assert_array_equal(golden["vals"].reshape(-1)[kept], golden["new_vals"])
