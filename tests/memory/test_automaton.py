"""The automaton memory against the plain one, and the laws that any automaton obeys."""

import itertools
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index.stores import MemoryStore, normal
from torch.testing import assert_close

from memlm.core.errors import FingerprintError, InputError
from memlm.core.types import TokenMemory
from memlm.index.cluster import ClusterConfig, cluster_store
from memlm.index.exact import ExactIndex
from memlm.index.partition import Clusters
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.automaton_config import AutomatonConfig
from memlm.memory.knn import KnnMemory
from memlm.ops.tokens import target_partial
from memlm.store.arrays import save_arrays
from memlm.testing.automaton import PlainAutomaton, log_probability

ALWAYS = 10**9
DIM = 3


class TextStore(MemoryStore):
    """A store that knows where documents end."""

    def __init__(self, keys, values, documents=None, positions=None):
        super().__init__(keys, values, shard=7)
        self.documents, self.positions = documents, positions


def world(seed=0, entries=40, vocab=4, distinct=12, lengths=(17, 1, 22)):
    """A store with repeated contexts, so that pointers live and scores tie."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, distinct, (entries,), generator=generator)
    keys = normal(distinct, DIM, seed=seed, dtype=torch.float64)[kinds]
    values = torch.randint(0, vocab, (entries,), generator=generator)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[:entries]
    return TextStore(keys, values, documents)


def text(seed=1, rows=3, time=9, vocab=4):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, time + 1), generator=generator)
    return tokens, normal(rows, time, DIM, seed=seed, dtype=torch.float64)


def walk(memory, tokens, queries, state=None, valid=None):
    """Observe token t, read at t, for all t; what was read, and the states after each position."""
    state = memory.init_state(len(tokens)) if state is None else state
    read, states = [], []
    for time in range(queries.shape[1]):
        here = slice(time, time + 1)
        mask = {} if valid is None else {"valid": valid[:, here]}
        state = memory.observe(tokens[:, here], queries[:, here], state, **mask)
        candidates, state = memory.read(queries[:, time], state)
        read.append(candidates)
        states.append(state)
    return read, states


def partials(read, tokens):
    """lse and target_lse ``(rows, time)`` of the tokens that follow."""
    each = [target_partial(c, tokens[:, t + 1]) for t, c in enumerate(read)]
    return torch.stack([p.lse for p in each], 1), torch.stack([p.target_lse for p in each], 1)


def row_of(candidates, row):
    """(entry, score, token) of the valid candidates of a row, sorted."""
    scores, tokens, ids, valid = (part[row].tolist() for part in candidates)
    return sorted((i, s, t) for s, t, i, v in zip(scores, tokens, ids, valid, strict=True) if v)


def same(a, b):
    assert [(i, t) for i, _, t in a] == [(i, t) for i, _, t in b]
    assert_close([s for _, s, _ in a], [s for _, s, _ in b], atol=1e-9, rtol=0)


def same_state(a, b):
    """Equal but for the padding of rows."""
    assert a.length == b.length
    assert all(torch.equal(*pair) for pair in zip(a.counters, b.counters, strict=True))
    for mine, theirs in ((a.entries, b.entries), (a.pointers, b.pointers)):
        assert [r[r >= 0].tolist() for r in mine] == [r[r >= 0].tolist() for r in theirs]


def same_past(a, b):
    """Equal where the next token will be compared: the pointers of the last read are used up."""
    same_state(a._replace(pointers=a.pointers[:, :0]), b._replace(pointers=b.pointers[:, :0]))


def test_it_is_a_token_memory():
    assert isinstance(AutomatonMemory(world(), k=3), TokenMemory)


settings_of_automata = st.fixed_dictionaries(
    {
        "k": st.integers(1, 40),
        "min_knns": st.sampled_from([0, 1, 2, 5, ALWAYS]),
        "max_knns": st.integers(1, 50),
        "temperature": st.sampled_from([1.0, 0.5, 7.0]),
        "multiplicity": st.sampled_from(["set", "legacy", 0.0, 1.5, -2]),
    }
)


@settings(deadline=None, max_examples=150)
@given(
    settings_of_automata,
    st.integers(0, 10_000),
    st.sampled_from([0, 3, 8]),
    st.sampled_from(["documents", "all", "given"]),
    st.sampled_from([None, "left", "right", "anywhere"]),
)
def test_it_does_what_the_plain_one_does(options, seed, clusters, successors, padding):
    draw = random.Random(seed)
    store = world(seed, vocab=draw.choice([2, 4]))
    entries = len(store)
    cluster_of = [draw.randrange(-1, clusters) for _ in range(entries)] if clusters else None
    linked = torch.tensor([draw.randrange(-1, entries) for _ in range(entries)])
    memory = AutomatonMemory(
        store,
        clusters=None
        if cluster_of is None
        else Clusters.from_assignment(torch.tensor(cluster_of), clusters),
        successors=linked if successors == "given" else successors,
        **options,
    )
    rows, time = draw.randrange(1, 4), draw.randrange(1, 9)
    tokens, queries = text(seed, rows, time, vocab=4)
    lengths = [draw.randrange(1, time + 1) for _ in range(rows)]
    valid = torch.arange(time) < torch.tensor(lengths).unsqueeze(1)
    if padding == "left":
        valid = valid.flip(1)
    elif padding == "anywhere":
        valid = torch.tensor([[draw.random() < 0.7 for _ in range(time)] for _ in range(rows)])
    valid = None if padding is None else valid
    read, states = walk(memory, tokens, queries, valid=valid)

    multiplicity = options.pop("multiplicity")
    plain = [
        PlainAutomaton(
            store.keys.numpy(),
            store.values.tolist(),
            memory._successors[:-1].tolist(),
            cluster_of=cluster_of,
            distinct=multiplicity != "legacy",
            bonus=multiplicity if isinstance(multiplicity, float | int) else 0.0,
            **options,
        )
        for _ in range(rows)
    ]
    for at, candidates in enumerate(read):
        for row, one in enumerate(plain):
            if valid is not None and not valid[row, at]:
                assert not candidates.valid[row].any()
                continue
            one.observe(int(tokens[row, at]))
            expected = one.read(queries[row, at].numpy())
            same(row_of(candidates, row), sorted(expected))
    stats = memory.stats(states[-1])
    assert stats["steps"] == sum(one.steps for one in plain)
    assert stats["searches"] == sum(len(one.runs) for one in plain)
    if stats["searches"]:
        runs = sum(sum(one.runs) for one in plain)
        assert stats["foss_legacy"] == runs / (runs + stats["searches"])


def test_scores_are_log_probabilities_of_the_plain_one():
    store = world()
    memory = AutomatonMemory(store, k=5, temperature=0.5)
    tokens, queries = text(rows=1)
    plain = PlainAutomaton(
        store.keys.numpy(),
        store.values.tolist(),
        memory._successors[:-1].tolist(),
        k=5,
        temperature=0.5,
    )
    state = memory.init_state(1)
    for at in range(queries.shape[1]):
        state = memory.observe(tokens[:, at : at + 1], queries[:, at : at + 1], state)
        partial, state = memory.score(queries[:, at], tokens[:, at + 1], state)
        plain.observe(int(tokens[0, at]))
        expected = log_probability(plain.read(queries[0, at].numpy()), int(tokens[0, at + 1]))
        assert float(partial.target_lse - partial.lse) == pytest.approx(expected)


CASES = [
    {"k": 6},
    {"k": 6, "min_knns": 4, "clusters": True},
    {"k": 9, "min_knns": 2, "clusters": True, "multiplicity": "legacy", "max_knns": 8},
    {"k": 2, "multiplicity": 0.7, "min_knns": ALWAYS},
    {"k": 3, "min_knns": 0},
]


def made(store=None, clusters=False, **options):
    store = world() if store is None else store
    partition = Clusters.from_assignment(torch.arange(len(store)) % 9) if clusters else None
    return AutomatonMemory(store, clusters=partition, **options)


@pytest.mark.parametrize("options", CASES)
def test_a_batch_of_sequences_is_one_by_one(options):
    memory = made(**options)
    tokens, queries = text(rows=5, time=12)
    read, states = walk(memory, tokens, queries)
    for row in range(5):
        alone, alone_states = walk(memory, tokens[row : row + 1], queries[row : row + 1])
        for together, one in zip(read, alone, strict=True):
            same(row_of(together, row), row_of(one, 0))
        same_state(memory.select_rows(states[-1], torch.tensor([row])), alone_states[-1])


@pytest.mark.parametrize("options", CASES)
def test_pieces_of_any_length_lead_to_the_same_state(options):
    memory = made(**options)
    tokens, queries = text(rows=2, time=8)
    _, states = walk(memory, tokens, queries)
    for pieces in ([8], [3, 5], [1, 6, 1]):
        state, begin = memory.init_state(2), 0
        for length in pieces:
            here = slice(begin, begin + length)
            state = memory.observe(tokens[:, here], queries[:, here], state)
            begin += length
            _, state = memory.read(queries[:, begin - 1], state)
            same_state(state, states[begin - 1])


@pytest.mark.parametrize("options", CASES)
def test_rows_are_selected_copied_and_dropped(options):
    memory = made(**options)
    tokens, queries = text(rows=3, time=10)
    index = torch.tensor([2, 0, 2, 2])
    read, states = walk(memory, tokens, queries)
    middle = memory.select_rows(states[4], index)
    chosen, _ = walk(memory, tokens[index, 5:], queries[index, 5:], middle)
    for before, after in zip(read[5:], chosen, strict=True):
        for row, origin in enumerate(index.tolist()):
            same(row_of(after, row), row_of(before, origin))


@pytest.mark.parametrize("options", CASES)
def test_rows_selected_twice_have_the_right_past(options):
    memory = made(**options)
    tokens, queries = text(rows=3, time=4)
    first, second = torch.tensor([2, 0, 1]), torch.tensor([1, 1, 2])
    _, states = walk(memory, tokens, queries)
    moved = memory.select_rows(memory.select_rows(states[-1], first), second)
    same_past(memory.crop(moved, 2), memory.select_rows(states[1], first[second]))


class Spy:
    """An index that counts the queries it is asked."""

    def __init__(self, index):
        self.index, self.calls = index, []

    def __len__(self):
        return len(self.index)

    def __getattr__(self, name):
        return getattr(self.index, name)

    def search(self, queries, k):
        self.calls.append(len(queries))
        return self.index.search(queries, k)


def test_rows_that_must_search_share_one_call_and_sleepers_do_not():
    store = repeated_text()
    spy = Spy(ExactIndex(store.keys))
    memory = AutomatonMemory(store, k=2, index=spy)
    tokens, queries = own_text(store)
    tokens, queries = tokens.repeat(3, 1), queries.repeat(3, 1, 1)
    tokens[1, 5] = 9  # nobody proposes this one
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[2, :4] = False
    _, states = walk(memory, tokens[:, :8], queries[:, :8], valid=valid)
    # both at the start, the sleeper when it wakes, the second row when it is surprised
    assert spy.calls == [2, 1, 1]
    assert states[3].pointers[2].max() == -1


@pytest.mark.parametrize("options", CASES)
def test_tokens_are_taken_back(options):
    memory = made(history=6, **options)
    tokens, queries = text(rows=3, time=12)
    read, states = walk(memory, tokens, queries)
    index = torch.tensor([1, 1, 2, 0])
    for length in range(6, 13):
        back = memory.crop(states[-1], length)
        same_past(back, states[length - 1])
        again, _ = walk(memory, tokens[:, length:], queries[:, length:], back)
        for first, second in zip(read[length:], again, strict=True):
            for row in range(3):
                same(row_of(first, row), row_of(second, row))
        beams = memory.crop(memory.select_rows(states[-1], index), length)
        same_state(beams, memory.select_rows(back, index))
        if length > 8:
            same_past(memory.crop(back, length - 2), states[length - 3])
    same_state(memory.crop(states[-1], 0), memory.init_state(3))
    assert memory.crop(states[-1], 12) is states[-1]
    with pytest.raises(InputError, match="history=7 or more"):
        memory.crop(states[-1], 5)
    with pytest.raises(InputError, match="length must lie between 0 and 12"):
        memory.crop(states[-1], 13)


@pytest.mark.parametrize("options", CASES)
def test_no_look_ahead(options):
    memory = made(**options)
    tokens, queries = text(rows=2, time=10)
    read, states = walk(memory, tokens, queries)
    for cut in (3, 7):
        other_tokens, other_queries = text(seed=99, rows=2, time=10)
        other_tokens[:, : cut + 1], other_queries[:, : cut + 1] = (
            tokens[:, : cut + 1],
            queries[:, : cut + 1],
        )
        again, other_states = walk(memory, other_tokens, other_queries)
        for time in range(cut + 1):
            assert all(torch.equal(a, b) for a, b in zip(read[time], again[time], strict=True))
            same_state(states[time], other_states[time])


def test_targets_do_not_enter_the_state():
    memory = made(k=5)
    tokens, queries = text(rows=2)
    state = memory.observe(tokens[:, :1], queries[:, :1], memory.init_state(2))
    after = [memory.score(queries[:, 0], torch.full((2,), y), state)[1] for y in range(4)]
    for one, other in itertools.pairwise(after):
        same_state(one, other)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["set", 0.0]))
def test_always_searching_everything_is_exact_knn(seed, multiplicity):
    store = world(seed)
    tokens, queries = text(seed)
    memory = AutomatonMemory(
        store, k=len(store), min_knns=ALWAYS, multiplicity=multiplicity, temperature=2.0
    )
    knn = KnnMemory(store, k=len(store), temperature=2.0)
    read, states = walk(memory, tokens, queries)
    assert memory.stats(states[-1])["saved"] == 0
    plain = [knn.read(queries[:, time])[0] for time in range(queries.shape[1])]
    assert_close(partials(read, tokens), partials(plain, tokens), atol=1e-9, rtol=0)


def test_legacy_counts_an_entry_as_often_as_it_was_reached():
    store = world()
    tokens, queries = text(rows=1, time=12)
    memory = AutomatonMemory(store, k=len(store), min_knns=ALWAYS, multiplicity="legacy")
    read, _ = walk(memory, tokens, queries)
    copies = Counter(i for candidates in read for i, _, _ in row_of(candidates, 0))
    assert max(copies.values()) > len(read)


def repeated_text(entries=60, vocab=7, seed=3):
    """A store of one text whose keys tell every position apart."""
    keys = normal(entries, 8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, vocab, (entries,), generator=generator)
    return TextStore(keys, values, torch.zeros(entries, dtype=torch.int64))


def own_text(store):
    """The store's own text: the keys as queries, the values as what comes next."""
    tokens = torch.cat([store.values[:1] * 0, store.values]).unsqueeze(0)
    return tokens, store.keys.unsqueeze(0)


def test_its_own_text_needs_one_search():
    store = repeated_text()
    tokens, queries = own_text(store)
    memory = AutomatonMemory(store, k=1)
    read, states = walk(memory, tokens, queries)
    stats = memory.stats(states[-1])
    assert (stats["steps"], stats["searches"]) == (len(store), 1)
    assert stats["saved"] == (len(store) - 1) / len(store)
    assert stats["foss_legacy"] == 0  # no search came after the walk
    for time, candidates in enumerate(read):
        assert [i for i, _, _ in row_of(candidates, 0)] == [time]
    lse, target_lse = partials(read, tokens)
    assert torch.equal(lse, target_lse)


def test_fewer_searches_are_saved_the_more_pointers_are_wanted():
    store = world(entries=400, vocab=3, distinct=30, lengths=(400,))
    tokens, queries = text(rows=4, time=60, vocab=3)
    saved = []
    for min_knns in (0, 1, 2, 4, 8, 16, ALWAYS):
        memory = AutomatonMemory(store, k=10, min_knns=min_knns)
        saved.append(memory.stats(walk(memory, tokens, queries)[1][-1])["saved"])
    assert saved == sorted(saved, reverse=True)
    assert saved[0] == 1
    assert saved[-1] == 0
    assert 0 < saved[2] < 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([None, 5]), st.sampled_from(["set", "legacy", 1.0]))
def test_the_order_of_the_store_does_not_matter(seed, clusters, multiplicity):
    generator = torch.Generator().manual_seed(seed)
    store = repeated_text(seed=seed, vocab=3)
    order = torch.randperm(len(store), generator=generator)
    cluster_of = torch.randint(-1, 5, (len(store),), generator=generator)
    shuffled = TextStore(store.keys[order], store.values[order])
    # entry order[i] of the store is now entry i
    inverse = torch.argsort(order)
    following = torch.arange(1, len(store) + 1)[order]
    successors = torch.where(
        following < len(store), inverse[following.clamp(max=len(store) - 1)], -1
    )
    options = {"k": 4, "min_knns": 2, "multiplicity": multiplicity}
    parts = [None, None]
    if clusters:
        parts = [Clusters.from_assignment(some) for some in (cluster_of, cluster_of[order])]
    memory = AutomatonMemory(store, clusters=parts[0], **options)
    other = AutomatonMemory(shuffled, clusters=parts[1], successors=successors, **options)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3, (2, 13), generator=generator)
    queries = normal(2, 12, 8, seed=seed + 1)
    first, states = walk(memory, tokens, queries)
    second, other_states = walk(other, tokens, queries)
    assert_close(partials(first, tokens), partials(second, tokens), atol=1e-5, rtol=1e-5)
    counters = states[-1].counters, other_states[-1].counters
    assert all(torch.equal(*pair) for pair in zip(*counters, strict=True))


def test_pointers_end_with_the_document():
    keys = normal(6, 8)
    values = torch.tensor([1, 2, 3, 4, 5, 6])
    store = TextStore(keys, values, torch.tensor([0, 0, 0, 1, 1, 1]))
    tokens, queries = own_text(store)
    memory = AutomatonMemory(store, k=1)
    _, states = walk(memory, tokens, queries)
    assert memory.stats(states[-1])["searches"] == 2
    crossing = AutomatonMemory(store, k=1, successors="all")
    _, states = walk(crossing, tokens, queries)
    assert crossing.stats(states[-1])["searches"] == 1
    # nothing follows the last entry
    state = crossing.observe(values[-1:].unsqueeze(0), queries[:, -1:], states[-1])
    assert state.pointers.shape == (1, 0)
    assert memory.describe()["successors"] == "documents"
    assert AutomatonMemory(MemoryStore(keys, values), k=1).describe()["successors"] == "all"


def test_pointers_do_not_jump_over_unstored_tokens():
    keys, values = normal(4, 8), torch.tensor([1, 2, 3, 4])
    documents, positions = torch.zeros(4), torch.tensor([1, 2, 5, 6])
    memory = AutomatonMemory(TextStore(keys, values, documents, positions), k=1)
    assert memory._successors[:-1].tolist() == [1, -1, 3, -1]


def test_states_and_out_degree():
    store = world()
    assert AutomatonMemory(store, k=3).states == len(store)
    assert AutomatonMemory(store, k=3).out_degree == (len(store) - 3) / len(store)
    cluster_of = torch.randint(-1, 6, (len(store),), generator=torch.Generator().manual_seed(0))
    clusters = Clusters.from_assignment(cluster_of)
    memory = AutomatonMemory(store, k=3, clusters=clusters, successors="all")
    state = [(c, -1) if c >= 0 else (-1, e) for e, c in enumerate(cluster_of.tolist())]
    pairs = {(state[e], state[e + 1]) for e in range(len(store) - 1)}
    assert memory.states == len(set(state))
    assert memory.out_degree == pytest.approx(len(pairs) / len(set(state)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_of_any_precision(dtype):
    store = world()
    store = TextStore(store.keys.half(), store.values, store.documents)
    memory = AutomatonMemory(store, k=5, min_knns=2)
    tokens, queries = text()
    read, _ = walk(memory, tokens, queries.to(dtype))
    assert {c.scores.dtype for c in read} == {torch.float32}
    exact, _ = walk(memory, tokens, queries.to(dtype).double())
    assert {c.scores.dtype for c in exact} == {torch.float64}
    assert_close(partials(read, tokens), partials(exact, tokens), check_dtype=False)


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_other_metrics(metric):
    base = world()
    store = TextStore(base.keys, base.values, base.documents)
    store.metric = metric
    memory = AutomatonMemory(store, k=len(store), min_knns=ALWAYS)
    tokens, queries = text()
    read, _ = walk(memory, tokens, queries)
    plain = [KnnMemory(store, k=len(store)).read(queries[:, t])[0] for t in range(len(read))]
    assert_close(partials(read, tokens), partials(plain, tokens), atol=1e-6, rtol=0)


def test_the_batch_and_gradients():
    memory = made(k=3)
    tokens, queries = text(rows=2)
    state = memory.init_state(2)
    with pytest.raises(InputError, match="state of 2 rows"):
        memory.observe(tokens[:1, :1], queries[:1, :1], state)
    with pytest.raises(InputError, match=r"queries must be \(2, 3\)"):
        memory.read(queries[:1, 0], state)
    with pytest.raises(InputError, match="finite"):
        memory.read(queries[:, 0] * float("nan"), state)
    with pytest.raises(InputError, match="rows must be at least 1"):
        memory.init_state(0)
    candidates, _ = memory.read(queries[:, 0].requires_grad_(), state)
    assert not candidates.scores.requires_grad


def test_settings_are_checked():
    store = world()
    for values, message in (
        ({"max_knns": 0}, "max_knns must be at least 1, got 0"),
        ({"min_knns": -1}, "min_knns must be at least 0, got -1"),
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be one of auto"),
        ({"multiplicity": "bag"}, "multiplicity must be 'set', 'legacy' or a number, got 'bag'"),
        ({"multiplicity": float("nan")}, "multiplicity must be a finite number"),
        ({"successors": "next"}, "successors must be one of"),
        ({"successors": "given"}, "successors that are given must be passed"),
        ({"successors": torch.arange(3)}, "successors must be one entry number"),
        ({"clusters": "given"}, "clusters that are given must be passed"),
        ({"clusters": "some"}, "clusters must be one of"),
        ({"scores": "both"}, "scores must be one of"),
        ({"index": "flat"}, "index must be one of"),
        ({"history": -1}, "history must be at least 0"),
        ({"clusters": Clusters.from_assignment(torch.zeros(3, dtype=torch.int64))}, "40 entries"),
        ({"index": ExactIndex(store.keys[:5])}, "store's 40 entries, got 5"),
    ):
        with pytest.raises(InputError, match=message):
            AutomatonMemory(store, **{"k": 3, **values})
    with pytest.raises(InputError, match="must hold entries"):
        AutomatonMemory(TextStore(torch.empty(0, 3), torch.empty(0)))
    with pytest.warns(UserWarning, match="at most the store's 40 entries, got 41"):
        assert AutomatonMemory(store, k=41).k == 40


def test_settings_change_without_loading_anything_again():
    store = world()
    memory = AutomatonMemory(store, k=6, min_knns=2)
    tokens, queries = text()
    reads = store.reads
    others = {"min_knns": 4, "max_knns": 9, "multiplicity": "legacy"}
    changed = memory.changed(5, 2.0, **others)
    assert store.reads == reads
    expected = AutomatonMemory(store, k=5, temperature=2.0, **others)
    assert changed.config == expected.config
    for mine, theirs in zip(
        walk(changed, tokens, queries)[0], walk(expected, tokens, queries)[0], strict=True
    ):
        for row in range(3):
            same(row_of(mine, row), row_of(theirs, row))
    assert memory.config.k == 6
    with pytest.raises(InputError, match="a setting to change must be one of min_knns"):
        memory.changed(5, 2.0, clusters="none")
    with pytest.raises(InputError, match="max_knns must be at least 1"):
        memory.changed(5, 2.0, max_knns=0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES)
def test_on_the_gpu_as_on_the_cpu(options):
    tokens, queries = text(rows=3, time=12)
    expected, states = walk(made(**options), tokens, queries)
    memory = made(device="cuda", **options)
    read, gpu_states = walk(memory, tokens.cuda(), queries.cuda())
    assert {part.device.type for candidates in read for part in candidates} == {"cuda"}
    for mine, theirs in zip(read, expected, strict=True):
        for row in range(3):
            same(row_of(mine, row), row_of(theirs, row))
    assert memory.stats(gpu_states[-1]) == made(**options).stats(states[-1])


@pytest.fixture
def saved(tmp_path):
    store = world(entries=400, lengths=(400,))
    return save_arrays(
        tmp_path / "store",
        store.keys.float(),
        store.values,
        documents=np.zeros(400, int),
        positions=np.arange(400),
    )


def test_clusters_saved_with_the_store_are_found(saved):
    assert AutomatonMemory(saved, k=3).clusters is None
    clusters = cluster_store(saved, ClusterConfig(clusters=8), quiet=True)
    memory = AutomatonMemory(saved, k=3)
    assert memory.clusters is not None
    assert torch.equal(memory.clusters.cluster_of, clusters.cluster_of)
    assert memory.describe()["clusters"]["clusters"] == 8
    assert AutomatonMemory(saved, k=3, clusters=None).clusters is None
    assert AutomatonMemory(saved, k=3, clusters=clusters).config.clusters == "auto"


def test_clusters_of_another_store_are_refused(saved, tmp_path):
    clusters = cluster_store(saved, ClusterConfig(clusters=8), quiet=True)
    other = save_arrays(tmp_path / "other", saved.load_keys() + 1, saved.values)
    with pytest.raises(FingerprintError, match="cluster this store"):
        AutomatonMemory(other, k=3, clusters=clusters)
    (tmp_path / "store" / "automaton").rename(tmp_path / "other" / "automaton")
    with pytest.raises(FingerprintError, match="cluster this store"):
        AutomatonMemory(other, k=3)


def test_settings_round_trip(saved):
    given = Clusters.from_assignment(torch.arange(400) % 20)
    options = {"k": 7, "min_knns": 3, "max_knns": 9, "multiplicity": 0.5, "scores": "index"}
    memory = AutomatonMemory(saved, clusters=given, successors="all", history=4, **options)
    config = AutomatonConfig.from_dict(memory.config.to_dict())
    assert config == memory.config
    assert config.clusters == "given"
    with pytest.raises(InputError, match="pass clusters"):
        AutomatonMemory.from_config(saved, config)
    again = AutomatonMemory.from_config(saved, config, clusters=given)
    assert again.describe() == memory.describe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = AutomatonMemory.from_config(saved, AutomatonConfig(k=5))
    assert plain.config == AutomatonConfig(k=5)
    assert plain.describe()["keys"] == "in memory"
