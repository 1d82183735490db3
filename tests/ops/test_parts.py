"""Parts of an attention: their union is one softmax, in every implementation."""

import pytest
import torch
from torch.testing import assert_close

from memlm.ops import window_attention as module
from memlm.ops.lambda_rule import Keys, LambdaConfig, first_keys
from memlm.ops.parts import Part, union_of_parts
from memlm.ops.window_attention import window_attention
from memlm.ops.window_step import step_attention

COLUMNS, WINDOW, SINKS = 23, 5, 2


def drawn(padding=0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, COLUMNS, 8), (2, 2, COLUMNS, 8), (2, 2, COLUMNS, 8)]
    query, key, value = (torch.randn(x, generator=generator).double() for x in shapes)
    positions = (torch.arange(COLUMNS) - padding).clamp(min=-1).expand(2, -1)
    return query, Keys(key, value, positions)


def scores_and_seen(query, keys):
    key = keys.key.repeat_interleave(2, 1)
    i, j = keys.positions[:, :, None], keys.positions[:, None, :]
    middle = (j >= SINKS) & (i - j >= WINDOW)
    return query @ key.transpose(-1, -2) * 8**-0.5, (j >= 0) & (i >= j), middle


def attended(query, keys, seen):
    scores, *_ = scores_and_seen(query, keys)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    value = keys.value.repeat_interleave(2, 1)
    output = scores.softmax(-1).nan_to_num() @ value
    return Part(output, scores.logsumexp(-1))


@pytest.mark.parametrize("impl", ["reference", "blocked", "tiled"])
@pytest.mark.parametrize("padding", [0, 4])
def test_window_sinks_and_all_between_them_are_full_attention(impl, padding, monkeypatch):
    if padding and impl == "tiled":
        impl = "auto"
    monkeypatch.setattr(module, "_BLOCK", 6)
    query, keys = drawn(padding)
    _, causal, middle = scores_and_seen(query, keys)
    other = attended(query, keys, causal & middle)
    assert torch.isneginf(other.lse).any()
    output = window_attention(
        query,
        keys.positions,
        keys,
        first_keys(keys, SINKS),
        LambdaConfig(WINDOW, SINKS),
        impl=impl,
        other=other,
    )
    assert_close(output, attended(query, keys, causal).output)


def test_a_step_too():
    query, keys = drawn()
    _, causal, middle = scores_and_seen(query, keys)
    other = attended(query, keys, causal & middle).narrow(COLUMNS - 1, COLUMNS)
    slots = COLUMNS + 3
    sinks = first_keys(keys, SINKS)
    held = Keys(*(torch.cat(pair, dim=2) for pair in zip(sinks[:2], keys[:2], strict=True)),
                torch.cat([sinks.positions, keys.positions], dim=1))  # fmt: skip
    output = step_attention(
        query[:, :, -1:],
        keys.positions[:, -1:],
        held,
        slots,
        LambdaConfig(WINDOW, SINKS),
        other=other,
    )
    assert_close(output, attended(query, keys, causal).output[:, :, -1:])


def test_empty_parts_change_nothing_and_give_no_gradient():
    query, keys = drawn()
    _, causal, _ = scores_and_seen(query, keys)
    full = attended(query, keys, causal)
    lse = torch.full_like(full.lse, -torch.inf, requires_grad=True)
    empty = Part(torch.zeros_like(full.output), lse)
    assert_close(union_of_parts(full, empty), full.output)
    both = union_of_parts(empty, empty)
    assert not both.any()
    both.sum().backward()
    assert lse.grad is not None
    assert not lse.grad.any()
