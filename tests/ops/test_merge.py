"""Laws of the algebra: splits, orders, groupings, identities, duplicates, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from memlm.core.errors import InputError
from memlm.core.merges import Gate, Mixture, Union, merge_from_dict
from memlm.core.types import Candidates, TargetPartial
from memlm.ops.merge import merge_logits, merge_target, mixture, mixture_logits, union, union_logits
from memlm.ops.tokens import target_partial, token_log_scores

VOCAB = 7
MERGES = [Union(), Mixture(0.25), Mixture(1.0), Mixture(0.0), Gate(0.6, -1.0)]
close = pytest.approx


def make(queries=5, k=12, seed=0, valid_share=0.8, dtype=torch.float64) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    return Candidates(
        scores=torch.randn(queries, k, generator=generator, dtype=dtype) * 5,
        tokens=torch.randint(0, VOCAB, (queries, k), generator=generator),
        ids=torch.arange(k).expand(queries, k),
        valid=torch.rand(queries, k, generator=generator) < valid_share,
    )


def part(candidates: Candidates, columns) -> Candidates:
    return Candidates(*(field[:, columns] for field in candidates))


def assert_same(a, b, tolerance=1e-12):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@settings(deadline=None)
@given(seed=st.integers(0, 999), cut=st.integers(0, 12), share=st.sampled_from([0.0, 0.3, 1.0]))
def test_union_does_not_depend_on_the_split(seed, cut, share):
    whole, targets = make(seed=seed, valid_share=share), torch.randint(0, VOCAB, (5,))
    halves = [target_partial(part(whole, s), targets) for s in (slice(cut), slice(cut, None))]
    assert_same(union(*halves), target_partial(whole, targets))
    assert_same(union(*reversed(halves)), target_partial(whole, targets))


@settings(deadline=None)
@given(seed=st.integers(0, 999), order=st.permutations(range(12)), cut=st.integers(0, 12))
def test_rows_do_not_depend_on_order_or_grouping(seed, order, cut):
    whole, logits = make(seed=seed), torch.randn(5, VOCAB, dtype=torch.float64)
    shuffled = part(whole, list(order))
    grouped = union_logits(
        union_logits(logits, part(shuffled, slice(cut))), part(shuffled, slice(cut, None))
    )
    torch.testing.assert_close(grouped, union_logits(logits, whole), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        mixture_logits(0.3, logits, shuffled),
        mixture_logits(0.3, logits, whole),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("merge", MERGES, ids=str)
def test_rows_and_targets_agree_and_sum_to_one(merge):
    candidates, logits = make(seed=3), torch.randn(5, VOCAB, dtype=torch.float64)
    candidates.valid[2] = False
    rows = torch.log_softmax(merge_logits(merge, logits, candidates), -1)
    torch.testing.assert_close(rows.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    for token in range(VOCAB):
        targets = torch.full((5,), token)
        base = TargetPartial(logits.logsumexp(-1), logits[:, token])
        scored = merge_target(merge, base, target_partial(candidates, targets))
        torch.testing.assert_close(scored.target_lse - scored.lse, rows[:, token])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("merge", [Union(), Mixture(0.7), Gate(0.6, -1.0)], ids=str)
def test_an_empty_memory_is_the_model_bit_for_bit(merge, dtype):
    logits = torch.randn(5, VOCAB, dtype=dtype)
    nothing = make(valid_share=0.0, dtype=dtype)
    assert torch.equal(merge_logits(merge, logits, nothing), logits)
    assert torch.equal(merge_logits(merge, logits, part(nothing, slice(0))), logits)
    base = TargetPartial(logits.logsumexp(-1), logits[:, 0])
    scored = merge_target(merge, base, target_partial(nothing, torch.zeros(5, dtype=torch.long)))
    assert torch.equal(scored.lse, base.lse)
    assert torch.equal(scored.target_lse, base.target_lse)


def test_lam_zero_is_the_model_bit_for_bit():
    logits, candidates = torch.randn(5, VOCAB), make(dtype=torch.float32)
    assert torch.equal(mixture_logits(0.0, logits, candidates), logits)
    assert torch.equal(mixture_logits(torch.zeros(5), logits, candidates), logits)


def test_lam_per_query_equals_a_number_per_row():
    logits, candidates = torch.randn(5, VOCAB, dtype=torch.float64), make(seed=5, valid_share=1)
    lam = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    rows = mixture_logits(lam, logits, candidates)
    for row, number in enumerate(lam.tolist()):
        alone = Candidates(*(field[row : row + 1] for field in candidates))
        torch.testing.assert_close(
            rows[row : row + 1].softmax(-1),
            mixture_logits(number, logits[row : row + 1], alone).softmax(-1),
        )


def test_duplicates_count_twice():
    candidates = make(seed=1, valid_share=1)
    twice = part(candidates, [*range(12), *range(12)])
    doubled = candidates._replace(scores=candidates.scores + torch.log(torch.tensor(2.0)).double())
    torch.testing.assert_close(
        token_log_scores(twice, VOCAB), token_log_scores(doubled, VOCAB), atol=1e-7, rtol=0
    )


def test_dense_rows_equal_a_loop():
    candidates = make(seed=8)
    rows = token_log_scores(candidates, VOCAB)
    for query in range(5):
        for token in range(VOCAB):
            mask = candidates.valid[query] & (candidates.tokens[query] == token)
            assert rows[query, token].item() == close(
                candidates.scores[query][mask].logsumexp(0).item() if mask.any() else -torch.inf
            )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("merge", [Union(), Mixture(0.3), Gate(0.6, -1.0)], ids=str)
def test_gradients_are_exact_also_where_all_is_masked(merge, share):
    candidates, targets = make(seed=2, valid_share=share), torch.arange(5)
    candidates.valid[1] = False

    def through_rows(logits, scores):
        rows = merge_logits(merge, logits, candidates._replace(scores=scores))
        return torch.log_softmax(rows, -1)

    def through_targets(logits, scores):
        base = TargetPartial(logits.logsumexp(-1), logits.gather(-1, targets[:, None]).squeeze(-1))
        merged = merge_target(
            merge, base, target_partial(candidates._replace(scores=scores), targets)
        )
        return merged.target_lse - merged.lse

    logits = torch.randn(5, VOCAB, dtype=torch.float64, requires_grad=True)
    scores = candidates.scores.clone().requires_grad_()
    gradcheck(through_rows, (logits, scores))
    gradcheck(through_targets, (logits, scores))


@pytest.mark.parametrize(
    ("gate", "same"),
    [(Gate(), Union()), (Gate(0.0, math.log(0.3 / 0.7)), Mixture(0.3))],
    ids=("union", "mixture"),
)
def test_the_ends_of_the_gate(gate, same):
    candidates, logits = make(seed=4), torch.randn(5, VOCAB, dtype=torch.float64)
    candidates.valid[3] = False
    rows = [
        torch.log_softmax(merge_logits(merge, logits, candidates), -1) for merge in (gate, same)
    ]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-10)


def test_a_gate_that_is_sure_stays_finite():
    logits, candidates = torch.randn(5, VOCAB), make(dtype=torch.float32)
    for bias in (-200.0, 200.0):
        base = TargetPartial(logits.logsumexp(-1), logits[:, 0])
        memory = target_partial(candidates, torch.zeros(5, dtype=torch.long))
        scored = merge_target(Gate(1.0, bias), base, memory)
        assert bool(torch.isfinite(scored.target_lse - scored.lse).all())


@pytest.mark.parametrize("values", [{"slope": math.inf}, {"bias": math.nan}], ids=str)
def test_a_gate_has_finite_numbers(values):
    with pytest.raises(InputError, match="must be a finite number"):
        Gate(**values)


def test_shapes_must_agree():
    a, b = (TargetPartial(torch.zeros(n), torch.zeros(n)) for n in (3, 4))
    with pytest.raises(InputError, match=r"must answer the same queries: got \(3,\) and \(4,\)"):
        union(a, b)
    with pytest.raises(InputError, match="same queries"):
        mixture(0.5, a, b)
    with pytest.raises(InputError, match="at least one memory"):
        union()


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_lam_must_be_a_probability(lam):
    with pytest.raises(InputError, match="lam must lie between 0 and 1, got"):
        Mixture(lam)


@pytest.mark.parametrize("merge", [Union(), Mixture(0.4), Gate(2.0, 0.5)], ids=str)
def test_merges_survive_json(merge):
    assert merge_from_dict(merge.to_dict()) == merge
