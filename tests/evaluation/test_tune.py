"""The grid from cached neighbours against evaluating every setting for real."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.memories import FixedMemory, PastMemory
from evaluation.test_perplexity import corpus_of
from memlm.core.errors import FingerprintError, InputError
from memlm.core.merges import Mixture
from memlm.core.types import TargetPartial
from memlm.data.windows import SlidingWindows
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.statistics import Statistics
from memlm.evaluation.trials import Grid, search_grid
from memlm.evaluation.tune import Tuning, default_ks, default_temperatures, tune
from memlm.index.exact import ExactIndex
from memlm.memory.knn import KnnMemory
from memlm.models.attach import attach
from memlm.models.fingerprint import model_hash
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

WINDOWS = SlidingWindows(8, 3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def store(tmp_path, model):
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(40, 16, generator=generator)
    values = tiny_tokens(1, 40, seed=9)[0]
    return save_arrays(
        tmp_path / "store", keys, values, model_hash=model_hash(model), tap="ffn_input"
    )


def test_every_trial_equals_an_evaluation(model, store):
    memory = KnnMemory(store, k=12, temperature=3.0)
    got = tune(
        model,
        corpus_of(),
        WINDOWS,
        memory,
        lams=(0.1, 0.7),
        temperatures=(1.0, 5.0),
        ks=(2, 12),
        batch_tokens=20,
    )
    assert len(got.trials) == 8
    for trial in got.trials:
        truth = evaluate(
            model,
            corpus_of(),
            WINDOWS,
            memory=KnnMemory(store, k=trial.k, temperature=trial.temperature),
            merge=Mixture(trial.lam),
        )
        assert trial.perplexity == pytest.approx(truth.perplexity, rel=1e-5)
    assert got.best == min(got.trials, key=lambda trial: trial.perplexity)
    alone = evaluate(model, corpus_of(), WINDOWS)
    assert got.base_perplexity == pytest.approx(alone.perplexity, rel=1e-6)
    assert got.tokens == alone.tokens
    assert got.cache_bytes == got.tokens * (8 + 5 * 12)
    assert got.protocol["scored"] == alone.protocol["scored"]
    assert got.protocol["memory"] == memory.describe()
    assert got.merge == Mixture(got.best.lam)


def test_recomputed_scores_of_an_exact_index(model, store):
    memory = KnnMemory(store, k=12, recompute=True)
    got = tune(model, corpus_of(), WINDOWS, memory, lams=(0.4,), temperatures=(2.0,), ks=(3,))
    truth = evaluate(
        model,
        corpus_of(),
        WINDOWS,
        memory=KnnMemory(store, k=3, temperature=2.0, recompute=True),
        merge=Mixture(0.4),
    )
    assert got.best.perplexity == pytest.approx(truth.perplexity, rel=1e-5)


def test_recomputed_scores_of_an_approximate_index_fix_k(model, store):
    class Approximate(ExactIndex):
        def describe(self):
            return {"engine": "faiss", "factory": "IVF2,Flat", "recall": None}

    memory = KnnMemory(store, k=12, recompute=True, index=Approximate(store.load_keys()))
    with pytest.raises(InputError, match="only the memory's own k=12 can be tried, got 3"):
        tune(model, corpus_of(), WINDOWS, memory, ks=(3,))
    got = tune(model, corpus_of(), WINDOWS, memory)
    assert {trial.k for trial in got.trials} == {12}


def test_defaults_and_round_trip(model, store, tmp_path):
    got = tune(model, corpus_of(), WINDOWS, KnnMemory(store, k=32))
    assert {trial.k for trial in got.trials} == {8, 32}
    assert 1.0 in {trial.temperature for trial in got.trials}
    assert len(got.trials) == 12 * 2 * len({trial.temperature for trial in got.trials})
    got.save(tmp_path / "tuning.json")
    again = Tuning.load(tmp_path / "tuning.json")
    assert again == got
    assert "chosen on this text" in again.describe()
    assert f"k={got.best.k}" in again.describe()


def test_tokens_without_neighbours_keep_the_model(model):
    got = tune(model, corpus_of(), WINDOWS, FixedMemory(silent_above=-1e9), temperatures=(1.0,))
    for trial in got.trials:
        assert trial.perplexity == pytest.approx(got.base_perplexity, rel=1e-6)
    # Among equals the smallest setting.
    assert got.best.k == 5
    assert got.best.lam == 0.05


def test_the_edge_of_the_grid_is_named(model, store):
    memory = KnnMemory(store, k=16)
    got = tune(model, corpus_of(), WINDOWS, memory, lams=(0.98, 0.99), ks=(16,), temperatures=(9,))
    assert got.at_edge == ("lam",)
    assert got.describe().endswith("at the edge of the grid: lam")


def statistics(log_probability, scores, matches) -> Statistics:
    """Of a store alone."""
    nothing = TargetPartial(*torch.empty(2, len(scores), 0, 0))
    base = TargetPartial(torch.zeros_like(log_probability), log_probability)
    return Statistics(base, nothing, scores, matches, torch.empty(len(scores), 0))


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 5),
    width=st.integers(1, 6),
    seed=st.integers(0, 999),
    lam=st.floats(0.01, 0.99),
    temperature=st.floats(0.1, 20),
)
def test_search_grid_against_plain_probabilities(tokens, width, seed, lam, temperature):
    generator = np.random.default_rng(seed)
    scores = -np.sort(generator.exponential(3.0, (tokens, width)))
    scores[generator.random((tokens, width)) < 0.2] = -np.inf
    matches = generator.random((tokens, width)) < 0.4
    base = np.log(generator.uniform(0.01, 1, tokens))
    kept = statistics(
        torch.tensor(base, dtype=torch.float32),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(matches),
    )
    grid = Grid(lams=(lam,), temperatures=(temperature,), ks=tuple(range(1, width + 1)))
    for trial in search_grid(kept, grid):
        loss = 0.0
        for row in range(tokens):
            weights = np.exp(scores[row, : trial.k] / temperature)
            probability = math.exp(base[row])
            if weights.sum() > 0:
                share = weights[matches[row, : trial.k]].sum() / weights.sum()
                probability = (1 - lam) * probability + lam * share
            loss -= math.log(probability)
        assert trial.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)


def test_search_grid_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    kept = statistics(
        -torch.rand(50, generator=generator),
        -torch.rand(50, 4, generator=generator),
        torch.rand(50, 4, generator=generator) < 0.3,
    )
    grid = Grid(lams=(0.3,), temperatures=(1.0,), ks=(2, 4))
    whole = search_grid(kept, grid)
    monkeypatch.setattr("memlm.evaluation.trials._CHUNK", 28)
    for a, b in zip(whole, search_grid(kept, grid), strict=True):
        assert a.perplexity == pytest.approx(b.perplexity, rel=1e-12)


def test_default_grids():
    assert default_ks(1024) == [4, 16, 64, 256, 1024]
    assert default_ks(3) == [3]
    scores = torch.tensor([[-1.0, -65.0], [-2.0, -torch.inf], [-torch.inf, -torch.inf]])
    # Spreads 64 and 0 of the rows with neighbours: the (lower) median is 0, so only 1 is left.
    assert default_temperatures(scores) == [1.0]
    assert default_temperatures(scores[:1]) == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]


# -- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lams": ()}, "at least one lam"),
        ({"lams": (0.5, 1.0)}, "both excluded, got 1.0"),
        ({"temperatures": (0.0,)}, "temperature to try must be above 0, got 0.0"),
        ({"ks": (6,)}, "between 1 and the 5 neighbours that the memory finds, got 6"),
        ({"ks": (0,)}, "got 0"),
        (
            {"most_bytes": 100},
            r"the statistics of 59 tokens with k=5 and 0 settings of the past take 1.95e-06",
        ),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(InputError, match=message):
        tune(model, corpus_of(), WINDOWS, FixedMemory(), **options)


def test_memories_that_cannot_be_tuned(model):
    with pytest.raises(
        InputError, match="must not carry state from token to token, but PastMemory does"
    ):
        tune(model, corpus_of(), WINDOWS, PastMemory())
    with pytest.raises(InputError, match=r"pass model.detach\(\) and model.memory"):
        tune(attach(model, FixedMemory()), corpus_of(), WINDOWS, FixedMemory())
    untempered = FixedMemory()
    untempered.temperature = "auto"
    with pytest.raises(InputError, match="temperature, but FixedMemory has 'auto'"):
        tune(model, corpus_of(), WINDOWS, untempered)


def test_a_store_of_another_model_or_tap(model, store):
    memory = KnnMemory(store, k=4)
    other = tiny_model("llama", seed=1)
    for run in (evaluate, tune):
        with pytest.raises(FingerprintError, match="was made by model xxh3_128"):
            run(other, corpus_of(), WINDOWS, memory=memory)
        with pytest.raises(
            FingerprintError, match="holds keys read at tap 'ffn_input', got tap 'final'"
        ):
            run(model, corpus_of(), WINDOWS, memory=memory, tap="final")
