"""The adaptive softmax: its scores, its partition, and known targets without whole rows."""

import pytest
import torch

from memlm.core.merges import Union
from memlm.core.types import Candidates
from memlm.models.adaptive.bands import make_bands
from memlm.models.adaptive.head import AdaptiveHead
from memlm.models.head import Head
from memlm.ops.merge import merge_logits, union
from memlm.ops.tokens import target_partial

WORDS, DIM = 60, 8
CUTOFFS = {"three bands": [20, 50], "one band": [WORDS]}


@pytest.fixture(params=CUTOFFS)
def head(request):
    torch.manual_seed(0)
    bands = make_bands(WORDS, CUTOFFS[request.param], DIM, 2)
    return AdaptiveHead(bands, DIM).double()


@pytest.fixture
def hidden():
    torch.manual_seed(1)
    return torch.randn(90, DIM, dtype=torch.float64, requires_grad=True)


TARGETS = torch.arange(90) % WORDS


def by_definition(head, hidden):
    """log p of every word: the class first, then the word inside it."""
    parts = [head.tables[0](hidden)]
    if head.classes is not None:
        parts.append(head.classes(hidden))
    first = torch.log_softmax(torch.cat(parts, -1), -1)
    frequent = head.bands[0].size
    found = [first[:, :frequent]]
    for number, table in enumerate(list(head.tables)[1:]):
        inside = torch.log_softmax(table(hidden @ head.projections[number].weight), -1)
        found.append(first[:, frequent + number, None] + inside)
    return torch.cat(found, -1)


def test_scores_are_log_probabilities_beside_the_partition(head, hidden):
    scores = head(hidden)
    expected = by_definition(head, hidden)
    torch.testing.assert_close(torch.log_softmax(scores, -1), expected)
    torch.testing.assert_close(expected.exp().sum(-1), torch.ones(90, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_targets_are_those_of_the_rows(head, hidden, chunk):
    said = head.target(hidden, TARGETS, chunk)
    scores = head(hidden)
    torch.testing.assert_close(said.lse, torch.logsumexp(scores, -1))
    torch.testing.assert_close(said.target_lse, scores.gather(-1, TARGETS[:, None])[:, 0])


def test_gradients_are_those_of_the_rows(head, hidden):
    names = ["hidden", *(name for name, _ in head.named_parameters())]
    places = [hidden, *head.parameters()]
    said = head.target(hidden, TARGETS, 16)
    got = torch.autograd.grad((said.lse - said.target_lse).sum(), places)
    loss = torch.nn.functional.cross_entropy(head(hidden), TARGETS, reduction="sum")
    for name, mine, expected in zip(names, got, torch.autograd.grad(loss, places), strict=True):
        torch.testing.assert_close(mine, expected, msg=name)


def test_a_union_needs_no_row_of_the_vocabulary(head, hidden):
    """The memory's mass beside the head's partition is the memory beside all words."""
    generator = torch.Generator().manual_seed(2)
    candidates = Candidates(
        scores=torch.randn(90, 5, dtype=torch.float64, generator=generator),
        tokens=torch.randint(0, WORDS, (90, 5), generator=generator),
        ids=torch.zeros(90, 5, dtype=torch.int64),
        valid=torch.rand(90, 5, generator=generator) < 0.8,
    )
    said = union(Head(head).target(hidden, TARGETS), target_partial(candidates, TARGETS))
    rows = merge_logits(Union(), head(hidden), candidates)
    expected = torch.log_softmax(rows, -1).gather(-1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(said.target_lse - said.lse, expected)


def test_nothing_asked(head):
    said = head.target(torch.zeros(0, DIM, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert said.lse.shape == said.target_lse.shape == (0,)


def test_dropout_only_in_training(hidden):
    head = AdaptiveHead(make_bands(WORDS, [20, 50], DIM, 2), DIM, dropout=0.5).double()
    assert not torch.equal(head(hidden), head(hidden))
    head.eval()
    assert torch.equal(head(hidden), head(hidden))
