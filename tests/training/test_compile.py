"""TRIME's objectives in one compiled graph, and under autocast."""

import pytest
import torch

from memlm.core.types import TargetPartial
from memlm.data.batches import IGNORED
from memlm.testing.tiny import tiny_model, tiny_tokens
from memlm.training.loss import head_memory_loss
from memlm.training.objectives.config import Objective
from memlm.training.objectives.memory import (
    Positions,
    external_memory,
    local_memory,
    long_memory,
)
from memlm.training.objectives.module import ObjectiveModule

# torch's own way of tracing a function with a backward of its own
COMPILING = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
MEMORIES = {
    "trime": local_memory,
    "trime_long": long_memory,
    "trime_ext": external_memory,
}


def inputs():
    draw = torch.Generator().manual_seed(0)
    keys, hidden = (torch.randn(2, 6, 8, generator=draw, requires_grad=True) for _ in range(2))
    weight = torch.randn(11, 8, generator=draw, requires_grad=True)
    targets = torch.randint(0, 11, (2, 6), generator=draw)
    targets[1, 4:] = IGNORED
    return keys, hidden, weight, targets


def loss_with(memory):
    def loss(keys, hidden, weight, targets):
        said = memory(Positions(keys, targets))
        flat = TargetPartial(*(half.flatten() for half in said))
        return head_memory_loss(hidden.flatten(0, 1), weight, targets.flatten(), flat)[0]

    return loss


@COMPILING
@pytest.mark.parametrize("method", MEMORIES)
def test_the_objective_is_one_graph_forward_and_backward(method):
    """``fullgraph`` raises at any break; aot_eager traces the backward pass too."""
    torch.compiler.reset()
    loss = loss_with(MEMORIES[method])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        given = inputs()
        value = function(*given)
        value.backward()
        results.append([value.detach(), *(part.grad for part in given[:3])])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["ce", *MEMORIES])
def test_half_precision_is_near_float32(method, dtype):
    tokens = tiny_tokens(2, 17, vocab_size=9)
    batch = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:].contiguous()}
    results = []
    for enabled in (False, True):
        module = ObjectiveModule(tiny_model("llama"), Objective(method=method)).eval()
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = module(batch)
        output.loss_sum.backward()
        gradients = [part.grad for part in module.parameters() if part.grad is not None]
        assert output.loss_sum.dtype == torch.float32
        assert all(part.dtype == torch.float32 for part in gradients)
        norm = torch.stack([part.norm() for part in gradients]).norm()
        results.append((output.loss_sum.detach(), norm))
    for exact, rounded in zip(*results, strict=True):
        torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["ce", *MEMORIES])
def test_autocast_on_a_gpu(method, dtype):
    tokens = tiny_tokens(2, 17, vocab_size=9).cuda()
    batch = {"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:].contiguous()}
    losses = []
    for enabled in (False, True):
        module = ObjectiveModule(tiny_model("llama").cuda(), Objective(method=method)).eval()
        with torch.autocast("cuda", dtype, enabled=enabled):
            losses.append(module(batch).loss_sum.detach())
    torch.testing.assert_close(*losses, rtol=0.03, atol=0)


@pytest.mark.gpu
@COMPILING
@pytest.mark.parametrize("method", MEMORIES)
def test_compiled_on_a_gpu(method):
    loss = loss_with(MEMORIES[method])
    given = [part.cuda() for part in inputs()]
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(*given), loss(*given))
