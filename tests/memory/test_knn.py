"""The kNN memory hands out the right tokens with the right scores, and refuses what cannot fit."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from index.stores import MemoryStore, normal
from torch.testing import assert_close

from memlm.core.errors import FingerprintError, InputError
from memlm.core.types import SearchResult, TokenMemory
from memlm.index.build import build_index
from memlm.index.exact import ExactIndex
from memlm.index.plan import IndexConfig
from memlm.memory import knn
from memlm.memory.knn import KnnConfig, KnnMemory, typical_spread
from memlm.store.arrays import save_arrays
from memlm.store.reader import Datastore

VALUES = torch.randint(0, 30, (500,), generator=torch.Generator().manual_seed(1)).int()
STORE = MemoryStore(normal(500, 8, seed=1), VALUES, shard=170)
QUERIES = normal(13, 8, seed=2)


class Fixed:
    """An index with one answer."""

    def __init__(self, scores, ids, metric="l2", size=500):
        self.answer = SearchResult(torch.tensor(scores), torch.tensor(ids))
        self.metric = metric
        self.size = size

    def __len__(self):
        return self.size

    def search(self, queries, k):
        return self.answer

    def describe(self):
        return {}

    def save(self, directory):
        pass


class OnDisk(MemoryStore):
    def __init__(self, path, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.path = path


def test_it_is_a_token_memory_without_state():
    memory = KnnMemory(STORE, k=4)
    assert isinstance(memory, TokenMemory)
    assert memory.init_state(3) is None
    assert memory.observe(torch.zeros(3, 1), torch.zeros(3, 1, 8), None) is None
    assert memory.select_rows(None, torch.tensor([0])) is None
    assert memory.crop(None, 1) is None


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_candidates_are_the_nearest_entries(metric, recompute, temperature):
    store = MemoryStore(STORE.keys, VALUES, metric)
    memory = KnnMemory(store, k=20, temperature=temperature, recompute=recompute)
    candidates, state = memory.read(QUERIES, None)
    found = ExactIndex(STORE.keys, metric).search(QUERIES, 20)
    assert state is None
    assert candidates.valid.all()
    assert_close(candidates.ids, found.ids)
    assert_close(candidates.scores * temperature, found.scores, rtol=1e-5, atol=2e-5)
    assert_close(candidates.tokens, VALUES.long()[found.ids])


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    k=st.integers(1, 40),
    temperature=st.floats(0.1, 100),
    target=st.integers(0, 40),
)
def test_scoring_agrees_with_the_sum_over_neighbours(rows, k, temperature, target):
    queries = QUERIES[:rows].double()
    memory = KnnMemory(STORE, k=k, temperature=temperature)
    partial, _ = memory.score(queries, torch.full((rows,), target), None)
    distances = (queries.unsqueeze(1) - STORE.keys.double()).square().sum(-1)
    for row in range(rows):
        nearest = distances[row].argsort()[:k]
        weights = torch.softmax(-distances[row, nearest] / temperature, 0)
        expected = weights[VALUES[nearest] == target].sum()
        assert_close((partial.target_lse - partial.lse)[row].exp(), expected, rtol=0, atol=1e-9)


def test_a_batch_answers_as_single_queries_do():
    memory = KnnMemory(STORE, k=9)
    together, _ = memory.read(QUERIES, None)
    for row, query in enumerate(QUERIES):
        alone, _ = memory.read(query.unsqueeze(0), None)
        assert_close(alone.scores[0], together.scores[row], rtol=1e-5, atol=1e-5)
        assert_close(alone.ids[0], together.ids[row])


def test_whole_windows_are_flattened():
    memory = KnnMemory(STORE, k=9)
    windows = normal(2, 5, 8, seed=4)
    flat, _ = memory.read(windows.reshape(10, 8), None)
    assert_close(memory.read(windows, None)[0].scores, flat.scores)
    targets = torch.arange(10)
    a, _ = memory.score(windows, targets.view(2, 5), None)
    b, _ = memory.score(windows.reshape(10, 8), targets, None)
    assert_close(a.target_lse, b.target_lse)


@pytest.mark.parametrize("recompute", [False, True])
def test_missing_neighbours_are_not_candidates(recompute):
    # The last entry of the store must not be read through id -1.
    index = Fixed([[-1.0, -float("inf")]] * 13, [[7, -1]] * 13)
    memory = KnnMemory(STORE, k=2, index=index, recompute=recompute)
    candidates, _ = memory.read(QUERIES, None)
    assert candidates.valid.tolist() == [[True, False]] * 13
    last = int(VALUES[-1])
    partial, _ = memory.score(QUERIES, torch.full((13,), last), None)
    assert torch.isneginf(partial.target_lse).all() == (last != int(VALUES[7]))
    assert torch.isfinite(partial.lse).all()


def test_recompute_replaces_the_scores_of_a_quantised_index():
    config = IndexConfig(factory="IVF4,PQ2x4", nprobe=4, recall_queries=0)
    index = build_index(STORE, config, quiet=True)
    rough, _ = KnnMemory(STORE, k=30, index=index).read(QUERIES, None)
    exact, _ = KnnMemory(STORE, k=30, index=index, recompute=True).read(QUERIES, None)
    distances = (QUERIES.unsqueeze(1) - STORE.keys[exact.ids]).square().sum(-1)
    assert_close(-exact.scores, distances, rtol=1e-5, atol=1e-5)
    assert (exact.scores[:, 1:] <= exact.scores[:, :-1]).all()
    assert_close(exact.ids.sort().values, rough.ids.sort().values)
    assert (rough.scores - exact.scores).abs().max() > 0.1
    assert_close(exact.tokens, VALUES.long()[exact.ids])


def test_recompute_gathers_in_parts(monkeypatch):
    whole, _ = KnnMemory(STORE, k=30, recompute=True).read(QUERIES, None)
    monkeypatch.setattr(knn, "_GATHER_BYTES", 30 * 8 * 4 * 2)
    parts, _ = KnnMemory(STORE, k=30, recompute=True).read(QUERIES, None)
    assert_close(parts.scores, whole.scores)


def test_half_precision_queries_are_cast():
    memory = KnnMemory(STORE, k=5, recompute=True)
    half, _ = memory.read(QUERIES.half(), None)
    full, _ = memory.read(QUERIES.half().float(), None)
    assert half.scores.dtype == torch.float32
    assert_close(half.scores, full.scores)


def test_the_automatic_temperature_is_the_median_spread():
    k = 12
    memory = KnnMemory(STORE, k=k, temperature="auto")
    distances = torch.cdist(STORE.keys.double(), STORE.keys.double()).square()
    distances.fill_diagonal_(torch.inf)
    nearest = distances.sort().values
    spread = nearest[:, k - 1] - nearest[:, 0]
    assert memory.config.temperature == "auto"
    assert memory.describe()["temperature"] == memory.temperature
    assert memory.temperature == pytest.approx(float(spread.median()), rel=0.1)
    whole = typical_spread(ExactIndex(STORE.keys), STORE, k, sample=500)
    # torch takes the lower of two medians.
    assert whole == pytest.approx(float(spread.median()), rel=1e-4)


def test_the_automatic_temperature_follows_the_scale_of_the_keys():
    scaled = MemoryStore(STORE.keys * 10, VALUES)
    ratio = (
        KnnMemory(scaled, k=8, temperature="auto").temperature
        / KnnMemory(STORE, k=8, temperature="auto").temperature
    )
    assert ratio == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_store_of_copies_has_temperature_one(count):
    store = MemoryStore(torch.ones(count, 8), VALUES[:count])
    assert KnnMemory(store, k=1, temperature="auto").temperature == 1.0


def test_k_beyond_the_store_is_clamped_with_a_warning():
    small = MemoryStore(STORE.keys[:7], VALUES[:7])
    with pytest.warns(UserWarning, match="at most the store's 7 entries, got 1024; using 7"):
        memory = KnnMemory(small)
    assert memory.k == 7
    assert memory.read(QUERIES, None)[0].ids.shape == (13, 7)
    assert memory.config.k == 1024


def other_store_index():
    return ExactIndex(STORE.keys, store_fingerprint="other")


@pytest.mark.parametrize(
    ("error", "call", "words"),
    [
        (InputError, lambda: KnnMemory(STORE, k=0), "k must be at least 1, got 0"),
        (InputError, lambda: KnnMemory(STORE, temperature=0.0), "above 0, got 0.0"),
        (InputError, lambda: KnnMemory(STORE, temperature=-1), "above 0, got -1"),
        (InputError, lambda: KnnMemory(STORE, temperature=float("nan")), "above 0, got nan"),
        (InputError, lambda: KnnMemory(STORE, temperature=float("inf")), "finite number"),
        (InputError, lambda: KnnMemory(STORE, temperature="hot"), "or 'auto', got 'hot'"),
        (InputError, lambda: KnnMemory(STORE, index="faiss"), "one of auto, exact, got 'faiss'"),
        (
            InputError,
            lambda: KnnMemory(MemoryStore(torch.empty(0, 8), VALUES[:0])),
            "at least one entry, got an empty store",
        ),
        (
            InputError,
            lambda: KnnMemory(STORE, index=ExactIndex(STORE.keys[:9])),
            "the store's 500 entries, got 9",
        ),
        (
            InputError,
            lambda: KnnMemory(STORE, index=ExactIndex(STORE.keys[:, :4])),
            "the store's 8 dimensions, got 4",
        ),
        (
            InputError,
            lambda: KnnMemory(MemoryStore(STORE.keys, VALUES[:9]), k=3),
            "500 values, one per key, got 9",
        ),
        (
            InputError,
            lambda: KnnMemory(MemoryStore(STORE.keys, VALUES, "l3")),
            "metric must be one of",
        ),
        (InputError, lambda: KnnMemory(STORE, k=3).read(QUERIES[:, :5], None), r"\(queries, 8\)"),
        (
            FingerprintError,
            lambda: KnnMemory(STORE, index=other_store_index()),
            f"built from store other .* with store {STORE.fingerprint}",
        ),
    ],
)
def test_bad_arguments(error, call, words):
    with pytest.raises(error, match=words):
        call()


def test_a_saved_index_is_found_beside_its_store(tmp_path):
    store = OnDisk(tmp_path, STORE.keys, VALUES)
    assert KnnMemory(store, k=3).describe()["index"]["engine"] == "exact"
    config = IndexConfig(type="flat", recall_k=5)
    build_index(store, config, directory=tmp_path / "index", quiet=True)
    memory = KnnMemory(store, k=3)
    assert memory.describe()["index"]["engine"] == "faiss"
    assert KnnMemory(store, k=3, index="exact").describe()["index"]["engine"] == "exact"
    assert memory.describe()["index"]["recall"]["value"] == pytest.approx(1.0, abs=0.01)
    changed = OnDisk(tmp_path, STORE.keys + 1, VALUES)
    with pytest.raises(FingerprintError):
        KnnMemory(changed, k=3)


def test_exact_search_of_a_large_store_warns_with_its_cost(monkeypatch):
    monkeypatch.setattr(knn, "EXACT_NUMBERS", 500 * 8 - 1)
    with pytest.warns(UserWarning, match="all 500 keys are compared, about 8 ms per query"):
        KnnMemory(STORE, k=3)


def test_keys_are_loaded_into_memory_only_if_they_fit(monkeypatch):
    class Loadable(MemoryStore):
        loaded = 0

        def load_keys(self):
            self.loaded += 1
            return self.keys

    store = Loadable(STORE.keys, VALUES)
    in_memory, _ = KnnMemory(store, k=3).read(QUERIES, None)
    assert store.loaded == 1
    monkeypatch.setattr("memlm.index.keys._memory", lambda: 2 * 500 * 8 * 4 - 1)
    streamed, _ = KnnMemory(store, k=3).read(QUERIES, None)
    assert store.loaded == 1
    assert_close(streamed.ids, in_memory.ids)


def test_settings_round_trip():
    config = KnnConfig(k=5, temperature="auto", recompute=True)
    again = KnnConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    memory = KnnMemory.from_config(STORE, again)
    assert memory.config == config
    assert (memory.k, memory.recompute) == (5, True)


def test_changed_settings_keep_store_and_index():
    memory = KnnMemory(STORE, k=5, temperature="auto", recompute=True)
    changed = memory.changed(7, 3.0)
    assert (changed.k, changed.temperature, changed.recompute) == (7, 3.0, True)
    assert changed.index is memory.index
    assert changed.store is STORE
    assert memory.k == 5


def test_describe_and_stats_name_store_and_recall():
    memory = KnnMemory(STORE, k=5)
    described = json.loads(json.dumps(memory.describe()))
    assert described["store"] == STORE.fingerprint
    assert described["index"]["recall"]["value"] == 1.0
    assert memory.stats(None) == {
        "entries": 500,
        "k": 5,
        "searches_per_position": 1,
        "off": False,
    }


def test_values_may_be_arrays_or_columns():
    reads = [
        KnnMemory(MemoryStore(STORE.keys, values), k=4).read(QUERIES, None)[0].tokens
        for values in (VALUES, VALUES.numpy(), VALUES.unsqueeze(1), VALUES.long())
    ]
    for a, b in itertools.pairwise(reads):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["exact", "flat", "none"])
def test_a_datastore_on_disk(tmp_path, kind):
    keys = STORE.keys.half()
    store = save_arrays(tmp_path / "store", keys, VALUES, shard_rows=130)
    if kind != "none":
        config = IndexConfig(type=kind, recall_k=5)
        build_index(store, config, directory=store.path / "index", quiet=True)
    memory = KnnMemory(Datastore.open(store.path), k=9, recompute=True)
    candidates, _ = memory.read(QUERIES, None)
    found = ExactIndex(keys).search(QUERIES, 9)
    assert_close(candidates.ids, found.ids)
    assert_close(candidates.scores, found.scores, rtol=1e-4, atol=1e-4)
    assert_close(candidates.tokens, VALUES.long()[found.ids])
    assert memory.describe()["store"] == store.fingerprint

    other = save_arrays(tmp_path / "other", keys + 1, VALUES)
    with pytest.raises(FingerprintError) as caught:
        KnnMemory(other, k=9, index=ExactIndex(keys, store_fingerprint=store.fingerprint))
    assert store.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
