import pytest
import torch
from torch.autograd import gradcheck

from memlm.core.errors import InputError
from memlm.core.types import Bank
from memlm.ops import bank as room
from memlm.ops.bank import (
    Places,
    any_of,
    bank_lse,
    earlier_in_document,
    earlier_in_stream,
    other_documents,
)

RULES = {
    "local": earlier_in_document,
    "long": earlier_in_stream,
    "external": any_of(earlier_in_document, other_documents),
    "nothing": lambda query, key: torch.zeros(len(query[0]), len(key[0]), dtype=torch.bool),
}


def make(entries=23, dim=4, dtype=torch.float64):
    torch.manual_seed(entries)
    stream, document = torch.arange(entries) % 2, torch.arange(entries) // 6
    bank = Bank(
        keys=torch.randn(entries, dim, dtype=dtype),
        tokens=torch.randint(0, 5, (entries,)),
        stream=stream,
        document=document,
        position=torch.arange(entries),
    )
    return torch.randn(entries, dim, dtype=dtype), bank, torch.randint(0, 5, (entries,))


def score(query, bank, targets, rule, impl):
    places = Places(bank.stream, bank.document, bank.position)
    return bank_lse(query, bank, targets, places, RULES[rule], scale=0.5, impl=impl)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_chunked_equals_reference_forward_and_backward(rule, tile, monkeypatch):
    monkeypatch.setattr(room, "_TILE", tile)
    results = []
    for impl in ("reference", "chunked"):
        query, bank, targets = make()
        query.requires_grad_()
        bank = bank._replace(keys=bank.keys.requires_grad_())
        partial = score(query, bank, targets, rule, impl)
        seen = [x[~torch.isneginf(x)] for x in partial]
        (seen[0].sum() + seen[1].square().sum()).backward()
        results.append([*partial, query.grad, bank.keys.grad])
    for reference, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, reference, rtol=0, atol=1e-12)


def test_gradcheck_with_rows_that_see_nothing(monkeypatch):
    monkeypatch.setattr(room, "_TILE", 4)
    query, bank, targets = make(entries=7, dim=3)

    def log_masses(query, keys):
        partial = score(query, bank._replace(keys=keys), targets, "local", "chunked")
        return torch.logaddexp(partial.lse, torch.zeros(7)) + torch.logaddexp(
            partial.target_lse, torch.zeros(7)
        )

    gradcheck(log_masses, (query.requires_grad_(), bank.keys.requires_grad_()))


def test_a_position_never_sees_itself_or_the_future():
    query, bank, targets = make()
    before = score(query, bank, targets, "long", "chunked")
    bank.keys[10:] += 1
    bank.tokens[10:] += 1
    after = score(query, bank, targets, "long", "chunked")
    assert torch.equal(before.lse[:11], after.lse[:11])
    assert torch.equal(before.target_lse[:11], after.target_lse[:11])
    assert not torch.equal(before.lse[12:], after.lse[12:])


def test_bfloat16_accumulates_in_float32():
    query, bank, targets = make(dtype=torch.bfloat16)
    assert score(query, bank, targets, "long", "auto").lse.dtype == torch.float32


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_reach_the_scores(impl):
    query, bank, targets = make(dtype=torch.float32)
    expected = score(query, bank, targets, "long", impl)
    with torch.autocast("cpu", torch.bfloat16):
        found = score(query, bank, targets, "long", impl)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_dimensions_must_agree():
    query, bank, targets = make()
    with pytest.raises(InputError, match="must have one dimension: got 3 and 4"):
        score(query[:, :3], bank, targets, "local", "auto")


@pytest.mark.parametrize("tile", [1, 7, 64])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_many_banks_side_by_side_are_one_after_the_other(tile, impl, monkeypatch):
    monkeypatch.setattr(room, "_TILE", tile)
    query, bank, targets = make(entries=24)
    groups = [field.unflatten(0, (4, 6)) for field in bank]
    query, targets = query.unflatten(0, (4, 6)), targets.unflatten(0, (4, 6))
    together = score(query, Bank(*groups), targets, "long", impl)
    for number in range(4):
        alone = Bank(*(field[number] for field in groups))
        partial = score(query[number], alone, targets[number], "long", "reference")
        for one, other in zip(together, partial, strict=True):
            torch.testing.assert_close(one[number], other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["local", "long", "external"])
def test_nobody_sees_a_key_without_stream(rule):
    query, bank, targets = make()
    places = Places(bank.stream, bank.document, bank.position)
    hidden = bank._replace(stream=torch.full_like(bank.stream, -1))
    partial = bank_lse(query, hidden, targets, places, RULES[rule], scale=0.5)
    assert torch.isneginf(partial.lse).all()


def test_leading_dimensions_must_agree():
    query, bank, targets = make()
    with pytest.raises(InputError, match="must have the same leading dimensions"):
        score(query[None], bank, targets[None], "local", "auto")
