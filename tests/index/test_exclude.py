"""Searching with entries left out gives what an index without them would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.exclude import Exclusion, search_without
from memlm.index.plan import IndexConfig


def keys_of(entries: int, dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(entries, dim, generator=torch.Generator().manual_seed(seed))


def brute_force(keys, queries, k, out):
    """Nearest among what is not left out; ``out`` is ``(queries, entries)`` bool."""
    scores = -torch.cdist(queries.double(), keys.double()).square()
    scores = scores.masked_fill(out, -torch.inf)
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    ids = ids.masked_fill(best.isinf(), -1)[:, :k]
    return torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.integers(1, 40),
    k=st.integers(1, 50),
    share=st.floats(0, 1),
    queries=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_exact_search_finds_the_nearest_of_the_rest(entries, k, share, queries, seed):
    draw = torch.Generator().manual_seed(seed)
    keys, asked = keys_of(entries, seed=seed), keys_of(queries, seed=seed + 1)
    dead = torch.rand(entries, generator=draw) < share
    first = torch.randint(0, entries + 1, (queries,), generator=draw)
    end = torch.minimum(first + torch.randint(0, 9, (queries,), generator=draw), torch.tensor(40))
    found = search_without(ExactIndex(keys), asked, k, Exclusion(dead, first, end))
    place = torch.arange(entries)
    own = (place >= first[:, None]) & (place < end[:, None])
    torch.testing.assert_close(found.ids, brute_force(keys, asked, k, own | dead))
    assert (found.scores.isinf() == (found.ids < 0)).all()


@pytest.mark.parametrize(
    "config",
    [
        IndexConfig(type="exact"),
        IndexConfig(type="flat"),
        IndexConfig(factory="IVF8,Flat", nprobe=8, train_size=400),
        IndexConfig(factory="IVF8,PQ4x4", nprobe=3, train_size=400),
        IndexConfig(factory="OPQ4_8,IVF8,PQ4x4", nprobe=8, train_size=400),
        IndexConfig(factory="HNSW16,Flat"),
        IndexConfig(factory="IVF8,PQ4x4fs", nprobe=8, train_size=400),
    ],
    ids=["exact", "flat", "ivf", "ivfpq", "opq", "hnsw", "fast-scan"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_found_is_what_a_full_search_finds_without_the_dead(config):
    keys, asked, k = keys_of(400, 8), keys_of(6, 8, seed=9), 20
    index = build_index(keys, config, quiet=True)
    dead = torch.rand(400, generator=torch.Generator().manual_seed(3)) < 0.5
    found = search_without(index, asked, k, Exclusion(dead))
    assert not dead[found.ids[found.ids >= 0]].any()
    every = index.search(asked, 400)
    for row in range(len(asked)):
        ids = every.ids[row]
        alive = ids[(ids >= 0) & ~dead[ids.clamp(min=0)]][:k]
        mine = found.ids[row][found.ids[row] >= 0]
        if config.factory and "HNSW" in config.factory:  # a wider search walks the graph further
            assert len(set(alive.tolist()) & set(mine.tolist())) >= 0.8 * k
        else:
            assert mine.tolist() == alive.tolist()


def test_nothing_left_out_is_the_plain_search():
    keys = keys_of(30)
    index = ExactIndex(keys)
    plain, same = index.search(keys[:3], 5), search_without(index, keys[:3], 5, None)
    assert torch.equal(plain.ids, same.ids)


def test_one_range_per_query():
    with pytest.raises(InputError, match="one range must be left out per query, got 2 queries"):
        search_without(
            ExactIndex(keys_of(5)),
            keys_of(2),
            1,
            Exclusion(None, torch.zeros(3).long(), torch.ones(3).long()),
        )
