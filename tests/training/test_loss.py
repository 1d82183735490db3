"""The chunked loss equals the plain one, with its gradients."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from memlm.core.types import TargetPartial
from memlm.ops.logsumexp import safe_logsumexp
from memlm.training.loss import head_memory_loss


def reference(hidden, weight, targets):
    return cross_entropy(linear(hidden, weight).double(), targets, reduction="sum")


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 700])
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
def test_equals_the_plain_loss_and_its_gradients(rows, masked):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (rows,)).masked_fill(torch.rand(rows) < masked, -100)
    loss, _ = head_memory_loss(hidden, weight, targets, None)
    expected = reference(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-12)
    ours = torch.autograd.grad(3 * loss, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gives_gradients_only_where_they_are_wanted(frozen):
    torch.manual_seed(0)
    hidden = torch.randn(9, 4, requires_grad=frozen == "weight")
    weight = torch.randn(5, 4, requires_grad=frozen == "hidden")
    targets = torch.randint(0, 5, (9,))
    loss, _ = head_memory_loss(hidden, weight, targets, None)
    torch.testing.assert_close(loss.double(), reference(hidden, weight, targets))
    if frozen != "both":
        loss.backward()
        wanted = weight if frozen == "hidden" else hidden
        expected = wanted.detach().clone().requires_grad_()
        parts = (hidden.detach(), expected) if frozen == "hidden" else (expected, weight.detach())
        reference(*parts, targets).backward()
        torch.testing.assert_close(wanted.grad, expected.grad)


def test_under_autocast_products_are_bfloat16_and_gradients_float32():
    torch.manual_seed(0)
    hidden = torch.randn(300, 32, requires_grad=True)
    weight = (torch.randn(64, 32) / 8).requires_grad_()
    targets = torch.randint(0, 64, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_memory_loss(hidden, weight, targets, None)
    expected = reference(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() != expected.item()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=0)
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(expected, (hidden, weight))
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32
        torch.testing.assert_close(our, their, rtol=0.05, atol=0.02 * float(their.abs().max()))


def test_does_not_overflow():
    hidden = torch.full((2, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss, _ = head_memory_loss(hidden, weight, torch.tensor([0, 0]), None)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(hidden.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("masked", [0.0, 0.4])
def test_with_a_memory_it_is_one_softmax_over_both(masked):
    torch.manual_seed(3)
    hidden = torch.randn(300, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 12, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 300, dtype=torch.float64)  # on the target, and not
    scores[:, 7], scores[0, 8] = -torch.inf, -torch.inf
    scores.requires_grad_()
    targets = torch.randint(0, 31, (300,)).masked_fill(torch.rand(300) < masked, -100)
    memory = TargetPartial(lse=safe_logsumexp(scores, dim=0), target_lse=scores[0])
    loss, alone = head_memory_loss(hidden, weight, targets, memory)
    counted = targets != -100
    logits = torch.cat([linear(hidden, weight), scores.T], dim=1)[counted]
    right = torch.zeros_like(logits, dtype=torch.bool)
    right[:, 31] = True
    right[torch.arange(len(right)), targets[counted]] = True
    own = logits.masked_fill(~right, -torch.inf)
    expected = (logits.logsumexp(-1) - own.logsumexp(-1)).sum()
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-12)
    torch.testing.assert_close(alone, reference(hidden, weight, targets))
    ours = torch.autograd.grad(3 * loss, (hidden, weight, scores))
    theirs = torch.autograd.grad(3 * expected, (hidden, weight, scores))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-9, rtol=1e-9)
