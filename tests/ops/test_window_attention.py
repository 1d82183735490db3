"""Lambda attention: both implementations against a loop over pairs, and the laws of the mask."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lambda_cases import CONFIGS, DIM, case, rotate, rows
from torch.testing import assert_close

from memlm.core.errors import InputError
from memlm.ops import window_attention as module
from memlm.ops import window_tiles
from memlm.ops.window_attention import (
    Keys,
    LambdaConfig,
    first_keys,
    sink_keys,
    window_attention,
)
from memlm.ops.window_step import step_attention


def pairs(query, keys, config, *, rope=None, slopes=None, softcap=None):
    """The definition, pair by pair: whole sequences."""
    output = torch.zeros_like(query)
    groups = query.shape[1] // keys.key.shape[1]
    length = int(keys.positions.max())
    for b, h, i in ((b, h, i) for b in range(len(query)) for h in range(query.shape[1])
                    for i in range(query.shape[2])):  # fmt: skip
        place, scores, values = int(keys.positions[b, i]), [], []
        for j in range(i + 1):
            other = int(keys.positions[b, j])
            d = place - other
            fixed = any(begin <= other < end for begin, end in config.spans)
            if other < 0 or (d >= config.window and not fixed):
                continue
            if d >= config.window and config.distance_limit is not None:
                limit = config.distance_limit
                d = min(limit, length) if config.clamp == "original" else min(d, limit)
            if d >= config.window and config.clamp == "streaming":
                d = min(place, config.sinks + config.window - 1) - other
            q = query[b, h, i].view(1, 1, 1, -1)
            q = rope(q, torch.tensor([[d]])) if rope else q
            score = float(q.flatten() @ keys.key[b, h // groups, j]) / math.sqrt(DIM)
            score -= float(slopes[h]) * d if slopes is not None else 0.0
            scores.append(softcap * math.tanh(score / softcap) if softcap else score)
            values.append(keys.value[b, h // groups, j])
        if place >= 0:
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            output[b, h, i] = weights @ torch.stack(values)
    return output


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("extra", ["rope", "alibi", "softcap"])
def test_it_is_the_definition(config, impl, extra, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 5)
    query, keys = case(rows(13, 9, columns=13))
    options = {"slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])} if extra == "alibi" else {}
    options |= {"softcap": 1.5} if extra == "softcap" else {}
    rope = rotate if extra != "alibi" else None
    sinks = sink_keys(keys, config)
    output = window_attention(
        query, keys.positions, keys, sinks, config, rotate=rope, impl=impl, **options
    )
    assert_close(output, pairs(query, keys, config, rope=rope, **options))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    window=st.integers(1, 24),
    sinks=st.integers(0, 6),
    limit=st.none() | st.integers(1, 30),
    block=st.integers(1, 9),
    right=st.booleans(),
    new=st.integers(1, 20),
)
def test_blocks_change_nothing(lengths, window, sinks, limit, block, right, new):
    columns = max(lengths) + 1
    places = rows(*lengths, columns=columns)
    if right:
        places = torch.stack(
            [row.roll(n - columns) for row, n in zip(places, lengths, strict=True)]
        )
    query, keys = case(places)
    query, asked = query[:, :, -new:], places[:, -new:]
    config = LambdaConfig(window=window, sinks=sinks, distance_limit=limit)
    arguments = (query, asked, keys, first_keys(keys, sinks), config)
    before, module._BLOCK = module._BLOCK, block
    try:
        blocked = window_attention(*arguments, rotate=rotate, impl="blocked")
    finally:
        module._BLOCK = before
    assert_close(blocked, window_attention(*arguments, rotate=rotate, impl="reference"))


@settings(deadline=None, max_examples=80)
@given(
    length=st.integers(2, 60),
    past=st.integers(0, 30),
    window=st.integers(1, 20),
    sinks=st.integers(0, 70),
    limit=st.none() | st.integers(1, 30),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    span=st.sampled_from([1, 16, 8192]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_tiles_are_the_reference(length, past, window, sinks, limit, heads, span, dtype):
    past = past and max(past, window - 1)
    new = max(length, window) if past else length
    query, keys = case(
        torch.arange(past + new).expand(2, -1), heads=heads[0], key_heads=heads[1], dtype=dtype
    )
    config = LambdaConfig(window=window, sinks=sinks, distance_limit=limit)
    query, asked = query[:, :, past:], keys.positions[:, past:]
    first = first_keys(keys, sinks)
    before, window_tiles._QUERIES = window_tiles._QUERIES, span
    try:
        output = window_attention(query, asked, keys, first, config, rotate=rotate, impl="tiled")
    finally:
        window_tiles._QUERIES = before
    wide = [part.double() for part in (query, keys.key, keys.value, first.key, first.value)]
    expected = window_attention(
        wide[0],
        asked,
        Keys(*wide[1:3], keys.positions),
        Keys(*wide[3:], first.positions),
        config,
        rotate=rotate,
        impl="reference",
    )
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_what_cannot_be_tiled_is_refused_and_done_otherwise():
    config = LambdaConfig(window=4, sinks=1)
    for places, options in [
        (rows(9, 5, columns=9), {}),
        (rows(9, columns=9) * 2, {}),
        (rows(9, columns=9) + 1, {}),
        (rows(9, columns=9), {"softcap": 2.0}),
        (rows(9, columns=9), {"slopes": torch.ones(4)}),
    ]:
        query, keys = case(places)
        arguments = (query, places, keys, first_keys(keys, 1), config)
        with pytest.raises(InputError, match="tiles need float32"):
            window_attention(*arguments, impl="tiled", **options)
        assert_close(
            window_attention(*arguments, **options),
            window_attention(*arguments, impl="reference", **options),
        )


def test_without_the_private_kernel_blocks_serve(monkeypatch):
    assert window_tiles.find_kernel("no_such_attention") is None
    assert window_tiles.find_kernel("relu") is None
    query, keys = case(rows(9, columns=9))
    arguments = (query, keys.positions, keys, first_keys(keys, 1), LambdaConfig(4, 1))
    tiled = window_attention(*arguments, impl="tiled")
    monkeypatch.setattr(window_tiles, "_attend", None)
    with pytest.raises(InputError, match="a torch with the fused kernel"):
        window_attention(*arguments, impl="tiled")
    assert_close(window_attention(*arguments), tiled)
    assert torch.equal(window_attention(*arguments), window_attention(*arguments, impl="blocked"))


@pytest.mark.parametrize("far", [0, 10_000, 200_000_000])
@pytest.mark.parametrize("slots", [4, 7, 16])
@pytest.mark.parametrize("clamp", ["causal", "streaming"])
def test_a_step_on_a_ring_is_the_reference(far, slots, clamp):
    config = LambdaConfig(4, 2, 3 if clamp == "causal" else None, clamp)
    query, keys = case(far + torch.arange(slots)[None])
    query, asked = query[:, :, -1:], keys.positions[:, -1:]
    sinks = first_keys(case(torch.arange(2)[None], seed=1)[1], 2)
    slot = keys.positions % slots
    turned = keys._replace(key=rotate(keys.key, slot))
    ring = turned.select(slot.argsort(dim=1))
    held = Keys(*(torch.cat(parts, dim=2) for parts in zip(sinks[:2], ring[:2], strict=True)),
                torch.cat([sinks.positions, ring.positions], dim=1))  # fmt: skip
    output = step_attention(query, asked, held, slots, config, rotate=rotate)
    # distances are all that matters, and the reference needs no large angles for them
    expected = window_attention(query, asked, keys, sinks, config, rotate=rotate, impl="reference")
    assert_close(output, expected)


@pytest.mark.parametrize("impl", ["tiled", "blocked"])
def test_later_tokens_change_nothing_before(impl):
    query, keys = case(rows(40, columns=40))
    config = LambdaConfig(window=7, sinks=2, distance_limit=20)
    for at in (1, 9, 23):
        outputs = []
        for change in (0.0, 1.0):
            noise = torch.zeros(40, 1)
            noise[at:] = change
            other = keys._replace(key=keys.key + noise, value=keys.value - noise)
            sinks = first_keys(other, 2)
            outputs.append(
                window_attention(
                    query, keys.positions, other, sinks, config, rotate=rotate, impl=impl
                )
            )
        assert torch.equal(outputs[0][:, :, :at], outputs[1][:, :, :at])
        assert (outputs[0] != outputs[1])[:, :, at:].any()


def test_a_long_window_is_causal_attention():
    query, keys = case(rows(12, columns=12))
    config = LambdaConfig(window=12, sinks=3, distance_limit=2)
    output = window_attention(query, keys.positions, keys, first_keys(keys, 3), config)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, keys.key, keys.value, is_causal=True, enable_gqa=True
    )
    assert_close(output, expected)


def test_far_pinned_spans_are_exact():
    """Positions relative to each span: the same at 100 as at two hundred million."""
    query, keys = case(torch.arange(40)[None], dtype=torch.float32)
    outputs = []
    for far in (0, 200_000_000):
        config = LambdaConfig(4, 0, 30, pinned=((5 + far, 8 + far), (15 + far, 17 + far)))
        here = keys._replace(positions=keys.positions + far)
        sinks = sink_keys(here, config)
        assert (sinks.positions - far).tolist() == [[5, 6, 7, 15, 16]]
        outputs.append(window_attention(query, here.positions, here, sinks, config, rotate=rotate))
    assert_close(*outputs, rtol=1e-5, atol=1e-6)


def test_far_positions_are_exact():
    near = torch.arange(40)[None] + 1000
    query, keys = case(near, dtype=torch.float32)
    sinks = first_keys(case(torch.arange(3)[None], dtype=torch.float32)[1], 3)
    config = LambdaConfig(window=16, sinks=3, distance_limit=16)
    outputs = [
        window_attention(
            query, near + far, keys._replace(positions=near + far), sinks, config, rotate=rotate
        )
        for far in (0, 200_000_000)
    ]
    assert torch.equal(*outputs)


def test_gradients_reach_everything_and_padding_gives_none():
    query, keys = case(rows(9, 0, columns=9))
    leaves = [tensor.requires_grad_() for tensor in (query, keys.key, keys.value)]
    config = LambdaConfig(window=3, sinks=2, distance_limit=3)
    window_attention(
        query, keys.positions, keys, first_keys(keys, 2), config, rotate=rotate
    ).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad[0].abs().sum() > 0
        assert torch.equal(leaf.grad[1], torch.zeros_like(leaf.grad[1]))


def test_half_precision_stays_finite():
    query, keys = case(rows(20, 3, columns=20), dtype=torch.bfloat16)
    config = LambdaConfig(window=4, sinks=2, distance_limit=4)
    output = window_attention(query, keys.positions, keys, first_keys(keys, 2), config)
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 4, "sinks": -1}, "sinks must not be negative"),
        ({"window": 4, "distance_limit": 0}, "distance_limit must be at least 1"),
        ({"window": 4, "clamp": "never"}, "clamp must be"),
        ({"window": 4, "clamp": "streaming", "distance_limit": 4}, "distances of its own"),
        ({"window": 4, "pinned": ((20, 20),)}, "pinned spans must be"),
        ({"window": 4, "sinks": 10, "pinned": ((9, 12),)}, "behind the first 10 tokens"),
        ({"window": 4, "pinned": ((20, 30), (25, 40))}, "apart"),
        ({"window": 4, "clamp": "streaming", "pinned": ((20, 30),)}, "counts what is kept"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(InputError, match=words):
        LambdaConfig(**settings)


def test_shapes_are_checked():
    query, keys = case(rows(5, columns=5))
    config = LambdaConfig(window=4, sinks=1)
    sinks = first_keys(keys, 1)
    with pytest.raises(InputError, match="every query must have one position"):
        window_attention(query, keys.positions[:, 1:], keys, sinks, config)
    short = keys._replace(positions=rows(4, columns=4))
    with pytest.raises(InputError, match="every key must have one position"):
        window_attention(query, keys.positions, short, sinks, config)
    with pytest.raises(InputError, match="multiple of key heads"):
        window_attention(query[:, :3], keys.positions, keys, sinks, config)
    with pytest.raises(InputError, match="impl must be"):
        window_attention(query, keys.positions, keys, sinks, config, impl="fast")
