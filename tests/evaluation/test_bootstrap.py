import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.evaluation import bootstrap
from memlm.evaluation.bootstrap import perplexity_interval, ratio_interval


def documents(count, seed=0, spread=0.3):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 200, count)
    return generator.normal(3.0, spread, count) * tokens, tokens


def test_matches_a_naive_loop():
    nll, tokens = documents(7)
    generator = np.random.default_rng(5)
    draws = []
    for _ in range(50):
        chosen = [int(i) for i in generator.integers(0, 7, 7)]
        draws.append(np.exp(sum(nll[i] for i in chosen) / sum(tokens[i] for i in chosen)))
    interval = perplexity_interval(nll, tokens, resamples=50, level=0.8, seed=5)
    assert interval is not None
    # Quantiles are taken of the mean loss, then exponentiated: the same up to interpolation.
    low, high = np.exp(np.quantile(np.log(draws), (0.1, 0.9)))
    assert interval[:2] == pytest.approx((low, high), rel=1e-12)
    assert interval[2:] == (0.8, 50, 7, 5)


def test_holds_the_perplexity_and_narrows_with_documents():
    few, many = (perplexity_interval(*documents(count)) for count in (10, 1000))
    assert few is not None
    assert many is not None
    nll, tokens = documents(10)
    assert few.low < np.exp(nll.sum() / tokens.sum()) < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        nll, tokens = documents(40, seed)
        interval = perplexity_interval(nll, tokens, resamples=200, level=0.9, seed=seed)
        assert interval is not None
        hits += interval.low <= np.exp(3.0) <= interval.high
    assert 0.80 <= hits / 200 <= 0.97


def test_the_seed_decides():
    nll, tokens = documents(20)
    assert perplexity_interval(nll, tokens) == perplexity_interval(nll, tokens)
    assert perplexity_interval(nll, tokens) != perplexity_interval(nll, tokens, seed=1)


def test_does_not_depend_on_the_block(monkeypatch):
    nll, tokens = documents(20)
    whole = perplexity_interval(nll, tokens, resamples=100)
    monkeypatch.setattr(bootstrap, "_BLOCK", 60)
    assert perplexity_interval(nll, tokens, resamples=100) == whole


def test_one_scored_document_has_no_interval():
    assert perplexity_interval([10.0], [5]) is None
    assert perplexity_interval([10.0, 0.0], [5, 0]) is None
    assert ratio_interval([10.0], [11.0], [5]) is None


def test_unscored_documents_change_nothing():
    nll, tokens = documents(12)
    padded = perplexity_interval([*nll, 0.0], [*tokens, 0])
    assert padded == perplexity_interval(nll, tokens)


def test_pairing_cancels_shared_difficulty():
    nll, tokens = documents(30, spread=1.0)
    interval = ratio_interval(nll - np.log(1.1) * tokens, nll, tokens)
    assert interval is not None
    assert interval[:2] == pytest.approx((1 / 1.1, 1 / 1.1), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0.1, 50), st.integers(1, 40)), min_size=2, max_size=12))
def test_swapping_the_pair_inverts_the_ratio(rows):
    nll = [row[0] for row in rows]
    tokens = [row[1] for row in rows]
    other = [loss * 1.1 + 0.3 for loss in nll]
    forth = ratio_interval(nll, other, tokens, resamples=64)
    back = ratio_interval(other, nll, tokens, resamples=64)
    assert forth is not None
    assert back is not None
    assert forth.low == pytest.approx(1 / back.high, rel=1e-9)
    assert forth.high == pytest.approx(1 / back.low, rel=1e-9)


@pytest.mark.parametrize(
    ("nll", "tokens", "options", "message"),
    [
        ([1.0], [1, 2], {}, "one loss and one count"),
        ([1.0, 2.0], [1, 2], {"resamples": 0}, "resamples must be at least 1, got 0"),
        ([1.0, 2.0], [1, 2], {"level": 1.0}, "level must lie between 0 and 1"),
    ],
)
def test_bad_input(nll, tokens, options, message):
    with pytest.raises(InputError, match=message):
        perplexity_interval(nll, tokens, **options)
