"""Muon and AdamW as one: each weight moves as under its own optimiser, also after loading."""

import copy

import torch
from torch import nn

from memlm.training.optimizer import MuonAdamW, muon_adamw

RATES = {
    "muon_learning_rate": 0.02,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.matrix = nn.Linear(4, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def loss(self, ids):
        return self.frozen(self.matrix(self.table(ids))).square().mean()


def small():
    torch.manual_seed(0)
    return Small()


def steps(model, optimizer, count):
    for number in range(count):
        optimizer.zero_grad()
        model.loss(torch.tensor([number % 7, 3])).backward()
        optimizer.step()


def same(first, second):
    return all(map(torch.equal, first.parameters(), second.parameters()))


def test_weights_move_as_under_their_own_optimiser():
    model, twin = small(), small()
    steps(model, muon_adamw(model, model.table.weight, **RATES), 5)
    muon = torch.optim.Muon(
        [twin.matrix.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [twin.table.weight], "weight_decay": 0.1},
            {"params": [twin.matrix.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
        fused=True,
    )
    for number in range(5):
        twin.zero_grad()
        twin.loss(torch.tensor([number, 3])).backward()
        muon.step()
        adamw.step()
    assert same(model, twin)
    assert not same(model, small())


def test_a_loaded_state_continues_identically_and_follows_new_rates():
    model = small()
    optimizer = muon_adamw(model, model.table.weight, **RATES)
    steps(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    steps(model, optimizer, 4)

    other = small()
    other.load_state_dict(saved[0])
    resumed = muon_adamw(other, other.table.weight, **RATES)
    resumed.load_state_dict(saved[1])
    steps(other, resumed, 4)
    assert same(model, other)

    for group in resumed.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(other)
    steps(other, resumed, 1)
    assert same(before, other)


def test_a_closure_is_called_once_and_its_loss_returned():
    model = small()
    optimizer = MuonAdamW([model.matrix.weight], [model.table.weight], [], **RATES)
    calls = []

    def closure():
        calls.append(1)
        loss = model.loss(torch.tensor([1]))
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    assert calls == [1]


def test_every_table_is_one_also_where_it_is_not_tied_to_the_head():
    model = small()
    groups = muon_adamw(model, model.matrix.weight, **RATES).param_groups
    matrices, tables, vectors = (group["params"] for group in groups)
    assert matrices == []
    assert {id(p) for p in tables} == {id(model.table.weight), id(model.matrix.weight)}
    assert [id(p) for p in vectors] == [id(model.matrix.bias)]
