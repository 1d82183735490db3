"""Lambda attention on a CUDA device: every implementation there, against float64 on the CPU."""

import pytest
import torch
from lambda_cases import rows
from torch.testing import assert_close

from memlm.ops import window_flex
from memlm.ops.lambda_rule import Keys, LambdaConfig, sink_keys
from memlm.ops.parts import Part
from memlm.ops.window_attention import window_attention
from memlm.ops.window_varlen import can_varlen, kernel

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
DIM = 64
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
CONFIGS = [
    LambdaConfig(256, 10, 256),
    LambdaConfig(256, 0),
    LambdaConfig(1, 3, 1),
    LambdaConfig(100, 10, 400),
    LambdaConfig(100, 10, None, "streaming"),
    LambdaConfig(128, 4, 128, pinned=((300, 340),)),
    LambdaConfig(4000, 200, 4000),
]


def turn(x, positions):
    half = x.shape[-1] // 2
    steps = 1000.0 ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * steps
    cos, sin = (part.to(x.dtype) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def draw(places, heads, key_heads, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (places.shape[0], heads + 2 * key_heads, places.shape[1], DIM)
    parts = torch.randn(shape, generator=generator).to(dtype)
    query, key, value = parts.split([heads, key_heads, key_heads], dim=1)
    return query, Keys(key, value, places)


def on(device, keys, dtype=None):
    return Keys(*(part.to(device, dtype) for part in keys[:2]), keys.positions.to(device))


def agree(impl, dtype, config, places, *, new=None, heads=(4, 2), other=False, **how):
    query, keys = draw(places, *heads, dtype)
    new = new or places.shape[1]
    query, asked, sinks = query[:, :, -new:], places[:, -new:], sink_keys(keys, config)
    beside = Part(torch.randn(query.shape), torch.randn(query.shape[:3])) if other else None
    wide = None if beside is None else Part(*(part.double() for part in beside))
    expected = window_attention(
        query.double(), asked, *(on("cpu", part, torch.float64) for part in (keys, sinks)), config,
        impl="reference", other=wide, **how,
    )  # fmt: skip
    if beside is not None:
        beside = Part(*(part.cuda() for part in beside))
    got = window_attention(
        query.cuda(), asked.cuda(), *(on("cuda", part) for part in (keys, sinks)), config,
        impl=impl, other=beside, **{k: v.cuda() if k == "slopes" else v for k, v in how.items()},
    )  # fmt: skip
    assert got.dtype == dtype
    assert_close(got.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


WAYS = [
    (impl, dtype)
    for impl in ("auto", "blocked", "flex", "varlen")
    for dtype in TOLERANCE
    if (impl, dtype) != ("varlen", torch.float32)  # FlashAttention is for half precision
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("impl", "dtype"), WAYS, ids=str)
def test_it_is_the_reference(config, impl, dtype):
    for places in (rows(3000, columns=3000), rows(2500, 700, columns=2500)):
        agree(impl, dtype, config, places, rotate=turn)
    agree(impl, dtype, config, rows(3000, 2600, columns=3000), new=500, rotate=turn, heads=(4, 4))
    agree(impl, dtype, config, rows(2500, 700, columns=2500), rotate=turn, other=True)
    assert window_flex._COMPILED.works


@pytest.mark.parametrize("how", [{"softcap": 20.0}, {"slopes": torch.tensor([0.5, 0.2, 0.1, 0])}])
def test_soft_caps_and_alibi_by_flex(how):
    for config in CONFIGS:
        agree("flex", torch.float32, config, rows(2500, 700, columns=2500), **how)
    assert window_flex._COMPILED.works


def test_gradients_through_the_union():
    config, places = LambdaConfig(256, 10, 256), rows(1000, 600, columns=1000)
    query, keys = draw(places, 4, 2, torch.float32)
    gradients = []
    for impl in ("flex", "blocked"):
        leaves = [part.cuda().requires_grad_() for part in (query, *keys[:2])]
        here = Keys(*leaves[1:], places.cuda())
        output = window_attention(
            leaves[0], here.positions, here, sink_keys(here, config), config, rotate=turn, impl=impl
        )
        output.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for fast, slow in zip(*gradients, strict=True):
        assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_half_precision_needs_no_compiler():
    """FlashAttention is there and is taken for whole and for padded rows."""
    assert kernel() is not None
    places = rows(2500, 700, columns=2500)
    query, keys = draw(places, 4, 2, torch.bfloat16)
    config = LambdaConfig(256, 10, 256)
    scores = window_flex.Scores(config, 256, turn, None, 0.1, None)
    assert can_varlen(query.cuda(), places.cuda(), on("cuda", keys), scores)


@pytest.mark.parametrize("impl", ["flex", "varlen"])
def test_memory_is_linear(impl):
    """Nothing of size n x n, nor n x window: twice the length takes twice the memory."""
    config, peaks = LambdaConfig(1024, 10, 1024), []
    for length in (16_384, 32_768):
        places = torch.arange(length, device="cuda")[None]
        query, key, value = torch.randn(
            3, 1, 8, length, DIM, device="cuda", dtype=torch.bfloat16
        ).unbind()
        keys = Keys(key, value, places)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        window_attention(query, places, keys, sink_keys(keys, config), config, impl=impl)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.2 * peaks[0]
    assert peaks[1] < 20 * query.nbytes
