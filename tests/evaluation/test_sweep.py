"""Tuning memories of the text that is read: every trial against an evaluation, and kept parts."""

import math

import numpy as np
import pytest
import torch

from evaluation.test_perplexity import corpus_of
from memlm.core.errors import InputError
from memlm.core.merges import Gate, Mixture, Union
from memlm.core.types import TargetPartial
from memlm.data.windows import BlockWindows, SlidingWindows
from memlm.evaluation import statistics
from memlm.evaluation.perplexity import evaluate
from memlm.evaluation.trials import fit_gate
from memlm.evaluation.tune import Tuning, tune, with_settings
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.models.fingerprint import model_hash
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

WINDOWS = SlidingWindows(8, 3)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama").double()


@pytest.fixture(scope="module")
def store(tmp_path_factory, model):
    keys = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    values = tiny_tokens(1, 40, seed=9)[0]
    return save_arrays(
        tmp_path_factory.mktemp("sweep") / "store",
        keys,
        values,
        metric="ip",
        model_hash=model_hash(model),
        tap="ffn_input",
    )


LOCAL, LONG = LocalMemory(8, temperature=2.0), LongMemory(12, temperature=2.0)
READING = {
    "local": lambda store: LOCAL,
    "long": lambda store: LONG,
    "local + long": lambda store: Together(LOCAL, LONG),
    "twice": lambda store: Together(LOCAL, LongMemory(12, temperature=2.0, overlap="twice")),
    "all": lambda store: Together(LOCAL, LONG, KnnMemory(store, k=6, temperature=2.0)),
}


@pytest.mark.parametrize("windows", [WINDOWS, BlockWindows(5, 4)], ids=("sliding", "blocks"))
@pytest.mark.parametrize("kind", READING)
def test_every_trial_equals_an_evaluation(model, store, kind, windows):
    memory = READING[kind](store)
    more = {} if kind == "local" else {"sizes": (12, 4) if kind == "long" else (0, 12, 4)}
    if kind == "all":
        more |= {"ks": (2, 6), "interpolations": ((0.3, 5.0),)}
    got = tune(
        model,
        corpus_of(),
        windows,
        memory,
        merges=("union", "mixture", "gate"),
        lams=(0.3,),
        temperatures=(1.5, 4.0),
        **more,
    )
    settings = [(t.k, t.size, t.temperature, t.merge, t.flat) for t in got.trials]
    assert len(set(settings)) == len(settings) >= 2 * 3
    assert {type(trial.merge) for trial in got.trials} == {Union, Mixture, Gate}
    for trial in got.trials:
        again = None
        if trial.flat is not None:
            flat = memory.members[-1].changed(trial.k, trial.flat[1])
            again = (flat, Mixture(trial.flat[0]))
        truth = evaluate(
            model,
            corpus_of(),
            windows,
            memory=with_settings(memory, trial),
            merge=trial.merge,
            interpolate=again,
            carry="window",
            progress=False,
        )
        assert trial.perplexity == pytest.approx(truth.perplexity, rel=1e-6)
    assert got.best.perplexity == min(trial.perplexity for trial in got.trials)
    assert got.protocol["carry"] == "window"


def test_a_gate_is_at_least_as_good_as_what_it_starts_from(model):
    got = tune(
        model,
        corpus_of(),
        WINDOWS,
        LOCAL,
        merges=("union", "mixture", "gate"),
        temperatures=(1.5, 4.0),
    )
    for temperature in (1.5, 4.0):
        by_kind = {Union: math.inf, Mixture: math.inf, Gate: math.inf}
        for trial in got.trials:
            if trial.temperature == temperature:
                kind = type(trial.merge)
                by_kind[kind] = min(by_kind[kind], trial.perplexity)
        assert by_kind[Gate] <= min(by_kind[Union], by_kind[Mixture]) + 1e-9


def test_a_gate_finds_the_weights_that_made_the_text():
    draw = np.random.default_rng(0)
    tokens, slope, bias = 20_000, 0.5, -1.0
    odds = draw.normal(0, 3, tokens)
    said, model = draw.uniform(0.05, 0.95, (2, tokens))  # what each gives to the first of two words
    lam = 1 / (1 + np.exp(-(slope * odds + bias)))
    first = draw.random(tokens) < (1 - lam) * model + lam * said
    log = torch.from_numpy(np.log(np.where(first, [model, said], [1 - model, 1 - said])))
    zeros, odds = torch.zeros(tokens, dtype=torch.float64), torch.from_numpy(odds)
    base = TargetPartial(zeros, log[0])
    gate, loss = fit_gate(base, TargetPartial(odds, odds + log[1]), Gate())
    assert gate.slope == pytest.approx(slope, abs=0.15)
    assert gate.bias == pytest.approx(bias, abs=0.15)
    assert loss < fit_gate(base, TargetPartial(odds, odds + log[1]), Gate(0.5, -1.0))[1] + 1e-9


def test_a_gate_of_a_memory_that_never_speaks_stays_where_it_was():
    nothing = torch.full((4,), -torch.inf)
    base = TargetPartial(torch.zeros(4), -torch.ones(4))
    assert fit_gate(base, TargetPartial(nothing, nothing), Gate()) == (Gate(), 1.0)


def test_kept_parts_are_read_and_missing_ones_made(model, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "PART_TOKENS", 10)
    memory = Together(LOCAL, LONG)
    whole = tune(model, corpus_of(), WINDOWS, memory)
    first = tune(model, corpus_of(), WINDOWS, memory, folder=tmp_path)
    (folder,) = tmp_path.iterdir()
    parts = sorted(folder.glob("part-*"))
    assert len(parts) >= 2
    parts[1].unlink()
    asked = []
    run = statistics.Pass.run
    monkeypatch.setattr(
        statistics.Pass,
        "run",
        lambda self, watch, numbers, **more: (
            asked.append(len(numbers)) or run(self, watch, numbers, **more)
        ),
    )
    second = tune(model, corpus_of(), WINDOWS, memory, folder=tmp_path)
    assert 0 < sum(asked) < whole.protocol["window_count"]
    asked.clear()
    third = tune(model, corpus_of(), WINDOWS, memory, folder=tmp_path, merges=("mixture", "gate"))
    assert not asked, "other weights need no pass"
    assert len(third.trials) == len(whole.trials) * 13
    for got in (first, second):
        for a, b in zip(got.trials, whole.trials, strict=True):
            assert a.perplexity == pytest.approx(b.perplexity, rel=1e-6)
    tune(model, corpus_of(), WINDOWS, memory, folder=tmp_path, temperatures=(3.0,))
    assert len(list(tmp_path.iterdir())) == 2, "other statistics lie beside them"


def test_weights_of_a_pruned_store_are_not_divided_by_the_temperature(model, store):
    memory = KnnMemory(store, k=6, temperature=2.0)
    memory.weights = torch.linspace(-1, 2, len(store))
    got = tune(model, corpus_of(), WINDOWS, memory, temperatures=(5.0,), ks=(6,), lams=(0.4,))
    heavy = memory.changed(6, 5.0)
    heavy.weights = memory.weights
    truth = evaluate(model, corpus_of(), WINDOWS, memory=heavy, merge=Mixture(0.4))
    assert got.best.perplexity == pytest.approx(truth.perplexity, rel=1e-6)


def test_what_was_found_is_described_and_kept(model, store, tmp_path):
    memory = READING["all"](store)
    got = tune(model, corpus_of(), WINDOWS, memory, interpolations=[(0.99, 0.01)], ks=(6,))
    got.save(tmp_path / "tuning.json")
    assert Tuning.load(tmp_path / "tuning.json") == got
    assert got.describe().startswith(f"best of {len(got.trials)} settings: union temperature=")
    assert got.merge == Union()
    applied = got.apply(memory)
    assert {member.temperature for member in applied.members} == {got.best.temperature}
    assert got.interpolate(memory) is None
    flat = next(trial for trial in got.trials if trial.flat)
    assert flat.describe().endswith("interpolated lam=0.99 temperature=0.01")


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        (LOCAL, {"sizes": (0, 4)}, r"sizes are those of a long-term memory, got \[0, 4\]"),
        (LOCAL, {"ks": (4,)}, "ks and interpolations are of a store"),
        (LONG, {"sizes": (0, 4)}, "must have a size above 0 in every setting"),
        (LONG, {"sizes": (-1,)}, "every size to try must not be negative, got -1"),
        (LOCAL, {"merges": ("sum",)}, "a merge must be one of mixture, union, gate, got 'sum'"),
        (LOCAL, {"most_bytes": 10}, "with k=0 and 6 settings of the past take"),
        (Together(LOCAL, LOCAL), {}, "must have one local member, got two"),
        (LocalMemory(metric="l2"), {}, "must score whole windows, got metric 'l2'"),
    ],
    ids=str,
)
def test_bad_input(model, memory, options, message):
    with pytest.raises(InputError, match=message):
        tune(model, corpus_of(), WINDOWS, memory, **options)
