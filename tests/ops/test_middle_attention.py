"""Middle attention: the plain definition, bounds that hold, blocks that may lie anywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from memlm.ops.lambda_rule import LambdaConfig
from memlm.ops.middle_attention import Blocks, bounds_of, middle_part, queries_at_once
from memlm.ops.middle_rule import MiddleConfig

DIM, SINKS = 6, 2


def drawn(length, size, *, heads=4, key_heads=2, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    count = -(-(length - SINKS) // size)

    def some(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    key, value = (some(batch, key_heads, count, size, DIM) for _ in range(2))
    numbers = torch.arange(count).expand(batch, -1)
    positions = torch.stack([torch.arange(length), torch.arange(length) - length // 3])[:batch]
    query = some(batch, heads, length, DIM)
    return query, positions.clamp(min=-1), Blocks(key, value, bounds_of(key), numbers)


def turn(x, positions):
    angle = 0.1 * positions[:, None, :, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def naive(query, positions, blocks, config, seen, *, slopes=None, softcap=None, rotate=None):
    """The definition, query by query."""
    batch, heads, length, _ = query.shape
    at = seen.window // 2 if config.distance is None else config.distance
    output, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf).double()
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(length)):
        place, found = int(positions[b, i]), []
        q = query[b, h, i].view(1, 1, 1, -1)
        q = (rotate(q, torch.tensor([[at]])) if rotate else q).flatten()
        for slot, number in enumerate(blocks.numbers[b].tolist()):
            begin = SINKS + number * config.block
            near = config.capacity is None or place - begin < seen.window + config.capacity
            if number >= 0 and place - begin >= seen.window and near:
                key = blocks.key[b, h * blocks.key.shape[1] // heads, slot]
                bound = (torch.maximum(q * key.amax(0), q * key.amin(0))).sum()
                assert bound >= (key @ q).max() - 1e-12
                found.append((float(bound), slot, begin))
        if config.rule == "last" and place - seen.window + 1 - SINKS < config.k:
            continue
        scores, values = [], []
        for _, slot, begin in sorted(found, reverse=True)[: config.k // config.block]:
            for offset in range(config.block):
                if place - begin - offset >= seen.window:
                    group = h * blocks.key.shape[1] // heads
                    score = float(blocks.key[b, group, slot, offset] @ q) / math.sqrt(DIM)
                    score -= float(slopes[h]) * at if slopes is not None else 0.0
                    scores.append(softcap * math.tanh(score / softcap) if softcap else score)
                    values.append(blocks.value[b, group, slot, offset])
        if scores:
            row = torch.tensor(scores, dtype=torch.float64)
            lse[b, h, i], output[b, h, i] = row.logsumexp(0), row.softmax(0) @ torch.stack(values)
    return output, lse


@pytest.mark.parametrize("extra", ["rope", "alibi", "softcap"])
@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MiddleConfig(k=4, block=2), 3),
        (MiddleConfig(k=3, block=1, distance=0), 1),
        (MiddleConfig(k=6, block=3, capacity=7), 4),
        (MiddleConfig(k=40, block=4), 5),
        (MiddleConfig(k=3, block=1, rule="last"), 2),
    ],
    ids=str,
)
def test_it_is_the_definition(config, window, extra):
    query, positions, blocks = drawn(17, config.block)
    seen = LambdaConfig(window, SINKS)
    how = {"rope": {"rotate": turn}, "softcap": {"softcap": 1.5},
           "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])}}[extra]  # fmt: skip
    part = middle_part(query, positions, blocks, config, seen, **how)
    output, lse = naive(query, positions, blocks, config, seen, **how)
    assert_close(part.output, output)
    assert_close(part.lse, lse)
    assert torch.isneginf(part.lse).any()
    assert part.lse.isfinite().any()


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(3, 30),
    size=st.integers(1, 4),
    count=st.integers(1, 4),
    more=st.integers(0, 6),
    capacity=st.none() | st.integers(16, 30),
    seed=st.integers(0, 99),
)
def test_order_of_slots_and_holes_between_them_mean_nothing(
    length, size, count, more, capacity, seed
):
    config = MiddleConfig(k=count * size, block=size, capacity=capacity)
    query, positions, blocks = drawn(length, size, seed=seed)
    seen = LambdaConfig(size + more, SINKS)
    expected = middle_part(query, positions, blocks, config, seen)
    slots = blocks.numbers.shape[1]
    order = torch.randperm(slots + 2, generator=torch.Generator().manual_seed(seed))
    wide = Blocks(
        *(torch.cat([part, 9.0 * torch.ones_like(part[:, :, :1]).repeat_interleave(2, 2)], dim=2)
          for part in blocks[:3]),
        torch.nn.functional.pad(blocks.numbers, (0, 2), value=-1),
    )  # fmt: skip
    shuffled = Blocks(
        *(part[:, :, order].contiguous() for part in wide[:3]), wide.numbers[:, order]
    )
    found = middle_part(query, positions, shuffled, config, seen)
    assert_close(found.output, expected.output)
    assert_close(found.lse, expected.lse)
    fewer = middle_part(query, positions, wide.first(slots), config, seen)
    assert_close(fewer.output, expected.output)


def test_half_precision_and_gradients():
    query, positions, blocks = drawn(20, 2)
    seen, config = LambdaConfig(4, SINKS), MiddleConfig(k=4, block=2)
    half = Blocks(*(part.to(torch.bfloat16) for part in blocks[:3]), blocks.numbers)
    part = middle_part(query.to(torch.bfloat16), positions, half, config, seen)
    assert part.output.dtype == part.lse.dtype == torch.float32
    leaves = [x.requires_grad_() for x in (query, blocks.key, blocks.value)]
    part = middle_part(query, positions, blocks, config, seen)
    (part.output.square().sum() + part.lse[torch.isfinite(part.lse)].sum()).backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert leaf.grad.abs().sum() > 0


def test_a_step_stays_within_its_bounds():
    config = MiddleConfig(k=128)
    for batch, heads, slots in ((1, 4, 10), (1, 32, 4000), (8, 32, 100_000)):
        blocks = Blocks(*(torch.empty(0) for _ in range(3)), torch.empty(batch, slots))
        asked = queries_at_once(torch.empty(batch, heads, 100, 128), blocks, config)
        assert 1 <= asked <= 64
        assert asked == 1 or asked * batch * heads * (128 * 128 + slots) <= 2**22
