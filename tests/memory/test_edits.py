"""A memory of a store with deleted documents is one of a store that never had them."""

import pytest
import torch

from memlm.index.build import build_index, extend_index, load_index
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.index.exact import ExactIndex
from memlm.index.greedy import greedy_merge, nearest_entries
from memlm.index.plan import IndexConfig
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.store.arrays import save_arrays
from memlm.store.deleted import delete_documents
from memlm.store.rewrite import compact_store, join_stores, prune

DOCUMENTS, LENGTH, DIM, VOCABULARY = 10, 20, 6, 5


def make(path, seed=0):
    draw = torch.Generator().manual_seed(seed)
    entries = DOCUMENTS * LENGTH
    return save_arrays(
        path,
        torch.randn(entries, DIM, generator=draw),
        torch.randint(0, VOCABULARY, (entries,), generator=draw),
        documents=torch.arange(DOCUMENTS).repeat_interleave(LENGTH),
        positions=torch.arange(LENGTH).repeat(DOCUMENTS),
    )


def walk(memory, steps=12, rows=3):
    """What a memory says step by step: per row a sorted list of (score, token)."""
    draw = torch.Generator().manual_seed(7)
    queries = torch.randn(steps, rows, DIM, generator=draw)
    tokens = torch.randint(0, VOCABULARY, (steps, rows), generator=draw)
    state, said = memory.init_state(rows), []
    for query, token in zip(queries, tokens, strict=True):
        state = memory.observe(token[:, None], query[:, None], state)
        answer, state = memory.read(query, state)
        for row in range(rows):
            here = answer.valid[row]
            pairs = zip(answer.scores[row][here], answer.tokens[row][here], strict=True)
            said.append(sorted((round(float(s), 4), int(token)) for s, token in pairs))
    return said


@pytest.mark.parametrize("clustered", [False, True])
def test_deleted_as_if_never_there(tmp_path, clustered):
    store = make(tmp_path / "s")
    clusters = cluster_store(store, ClusterConfig(clusters=4), quiet=True) if clustered else None
    store = delete_documents(store, [0, 4, 9])
    small = compact_store(store, tmp_path / "small")
    alive = (~store.dead).nonzero().squeeze(-1)
    if clusters is not None:
        kept = type(clusters).from_assignment(clusters.cluster_of[alive], len(clusters))
    else:
        kept = None
    settings = {"k": 8, "min_knns": 3}
    there = AutomatonMemory(store, clusters=clusters, **settings)
    never = AutomatonMemory(small, clusters=kept, **settings)
    assert walk(there) == walk(never)
    assert walk(KnnMemory(store, k=8)) == walk(KnnMemory(small, k=8))
    assert there.describe()["dead"] == 60


def test_an_index_that_is_carried_on_finds_both(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two", seed=3)
    config = IndexConfig(factory="IVF4,Flat", nprobe=4, train_size=200)
    build_index(one, config, directory=tmp_path / "one" / "index", quiet=True)
    whole = join_stores([one, two], tmp_path / "whole")
    longer = extend_index(one.path / "index", whole, whole.path / "index", quiet=True)
    queries = torch.randn(5, DIM)
    exact = ExactIndex(whole.load_keys()).search(queries, 9)
    assert torch.equal(longer.search(queries, 9).ids, exact.ids)
    assert longer.describe()["recall"] is None
    again = load_index(whole.path / "index", whole)
    assert torch.equal(again.search(queries, 9).ids, exact.ids)
    with pytest.raises(ValueError, match="the keys must go on where the index of 200 keys"):
        extend_index(one.path / "index", make_short(tmp_path), tmp_path / "short", quiet=True)


def make_short(tmp_path):
    return save_arrays(tmp_path / "few", torch.randn(3, DIM), torch.tensor([1, 2, 3]))


def test_weights_count_as_copies(tmp_path):
    """A pruned store of exact copies says what the full one says."""
    base = make(tmp_path / "base")
    keys, values = base.load_keys(), base.values
    full = save_arrays(tmp_path / "full", keys.repeat(3, 1), values.repeat(3))
    near = nearest_entries(ExactIndex(full.load_keys()), full, 3, quiet=True)
    merge = greedy_merge(full.values, near, 2)
    assert len(merge.survivors) == len(base)
    small = prune(full, merge.parent, merge.weights, tmp_path / "small")
    queries, targets = torch.randn(6, DIM), torch.randint(0, VOCABULARY, (6,))
    mine, _ = KnnMemory(small, k=200, temperature=2.0).score(queries, targets)
    theirs, _ = KnnMemory(full, k=600, temperature=2.0).score(queries, targets)
    torch.testing.assert_close(torch.stack(mine), torch.stack(theirs))


def test_a_query_does_not_see_its_own_range(tmp_path):
    store = make(tmp_path / "s")
    keys = store.load_keys()[:4]
    first = torch.arange(4)
    guarded = KnnMemory(store, k=1).leaving_out(first, first + 1)
    answer, _ = guarded.read(keys)
    assert (answer.ids[:, 0] != first).all()
