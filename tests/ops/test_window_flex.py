"""Lambda attention by FlexAttention and by packed rows, against the reference.

The compiled kernel takes its seconds, so most cases run torch's own uncompiled FlexAttention, and
for packed rows a plain stand-in of the same signature: what is tested is everything around them.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lambda_cases import CONFIGS, case, rotate, rows
from torch.nn.attention.flex_attention import flex_attention
from torch.testing import assert_close

from memlm.core.errors import InputError
from memlm.ops import window_flex, window_varlen
from memlm.ops.lambda_rule import LambdaConfig, Scores, first_keys, sink_keys
from memlm.ops.parts import Part
from memlm.ops.window_attention import window_attention

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
EXTRAS = {"rope": {}, "alibi": {"slopes": SLOPES}, "softcap": {"softcap": 1.5}}
plain = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
# torch warns about itself when its compiler is first imported
compiling = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(window_flex._COMPILED, "kernel", flex_attention)


def wide(query, keys, sinks):
    """The same in float64."""
    return query.double(), *(part._replace(key=part.key.double(), value=part.value.double())
                             for part in (keys, sinks))  # fmt: skip


def both(impl, places, config, *, new=None, extra="rope", seed=0, heads=(4, 2)):
    """What ``impl`` gives in float32, and the reference in float64."""
    query, keys = case(places, seed=seed, dtype=torch.float32, heads=heads[0], key_heads=heads[1])
    new = new or places.shape[1]
    query, asked = query[:, :, -new:], places[:, -new:]
    sinks, how = sink_keys(keys, config), dict(EXTRAS[extra])
    if extra != "alibi":
        how["rotate"] = rotate
    got = window_attention(query, asked, keys, sinks, config, impl=impl, **how)
    query, keys, sinks = wide(query, keys, sinks)
    expected = window_attention(query, asked, keys, sinks, config, impl="reference", **how)
    return got, expected


def near(got, expected):
    assert got.dtype == torch.float32
    assert_close(got.double(), expected, rtol=3e-5, atol=3e-5)


@plain
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_flex_is_the_reference(config, extra, uncompiled, monkeypatch):
    monkeypatch.setattr(window_flex, "_BLOCK", 8)
    monkeypatch.setattr(window_flex, "_QUERIES", 16)
    places = rows(40, 21, columns=40)
    beyond = config.clamp == "causal" and (config.distance_limit or 0) > config.window
    beyond |= bool(config.pinned) and config.distance_limit is None
    if beyond and extra != "alibi":
        with pytest.raises(InputError, match=r"flex needs .* no limit beyond the window"):
            both("flex", places, config, extra=extra)
        return
    near(*both("flex", places, config, extra=extra))


@plain
@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    window=st.integers(1, 40),
    sinks=st.integers(0, 12),
    far=st.sampled_from([0, 10_000, 200_000_000]),
    right=st.booleans(),
    new=st.integers(1, 70),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
)
def test_flex_with_padding_pieces_and_far_positions(lengths, window, sinks, far, right, new, heads):
    columns = max(lengths) + 1
    places = rows(*lengths, columns=columns)
    if right:
        places = torch.stack(
            [row.roll(n - columns) for row, n in zip(places, lengths, strict=True)]
        )
    places = torch.where(places < 0, places, places + far)
    config = LambdaConfig(window, sinks, window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_flex._COMPILED, "kernel", flex_attention)
        patch.setattr(window_flex, "_BLOCK", 8)
        patch.setattr(window_flex, "_QUERIES", 32)
        near(*both("flex", places, config, new=min(new, columns), heads=heads))


@plain
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("extra", EXTRAS)
def test_merged_partial_softmaxes_are_the_reference(config, extra, uncompiled, monkeypatch):
    """The way of GPUs, with other keys under the same softmax, on a CPU."""
    monkeypatch.setattr(window_flex, "_BLOCK", 8)
    query, keys = case(rows(40, 21, columns=40), dtype=torch.float32)
    places, sinks = keys.positions, sink_keys(keys, config)
    how = {**EXTRAS[extra], "rotate": None if extra == "alibi" else rotate}
    limit = config.distance_limit
    if limit is not None and config.clamp == "original":
        limit = min(limit, int(places.max()))
    scores = Scores(config, limit, how["rotate"], how.get("slopes"), 0.5, how.get("softcap"))
    other = Part(torch.randn(query.shape), torch.randn(query.shape[:3]))
    got = window_flex.joined_span(query, places, keys, sinks, scores, other)
    query, keys, sinks = wide(query, keys, sinks)
    expected = window_attention(
        query, places, keys, sinks, config, other=other, impl="reference", scale=0.5, **how
    )
    real = (places >= 0)[:, None, :, None]
    near(got * real, expected * real)


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale,
             window_size, enable_gqa):  # fmt: skip
    """`varlen_attn` by definition; log-sum-exps are ``(heads, tokens)`` as on NVIDIA GPUs."""
    assert return_aux.lse
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert max_q == int(cu_seq_q.diff().max())
    assert max_k == int(cu_seq_k.diff().max())
    outputs, lses = [torch.zeros(0, *query.shape[1:])], [torch.zeros(query.shape[1], 0)]
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        groups = query.shape[1] // key.shape[1]
        k, v = (part[c:d].repeat_interleave(groups, 1) for part in (key, value))
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & (distance <= window_size[0])
        dots = torch.einsum("qhd,khd->hqk", query[a:b], k) * scale
        dots = dots.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", dots.softmax(-1), v))
        lses.append(dots.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    window=st.integers(1, 40),
    sinks=st.integers(0, 12),
    limit=st.none() | st.integers(1, 30),
    right=st.booleans(),
    new=st.integers(1, 40),
    span=st.sampled_from([7, 100]),
)
def test_packed_rows_are_the_reference(lengths, window, sinks, limit, right, new, span):
    columns = max(lengths) + 1
    places = rows(*lengths, columns=columns)
    if right:
        places = torch.stack(
            [row.roll(n - columns) for row, n in zip(places, lengths, strict=True)]
        )
    query, keys = case(places, dtype=torch.float32)
    query, asked = query[:, :, -new:], places[:, -new:]
    config, sinks = LambdaConfig(window, sinks, limit), first_keys(keys, sinks)
    assert window_varlen.is_packable(asked, places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_varlen, "kernel", lambda: stand_in)
        patch.setattr(window_varlen, "_QUERIES", span)
        scores = Scores(config, limit, rotate, None, 0.5, None)
        got = window_varlen.varlen(query, asked, keys, sinks, scores)
    query, keys, sinks = wide(query, keys, sinks)
    expected = window_attention(
        query, asked, keys, sinks, config, rotate=rotate, impl="reference", scale=0.5
    )
    near(got, expected)


def test_what_cannot_be_packed():
    places = torch.arange(6)[None]
    assert window_varlen.is_packable(places[:, 2:], places)
    for queries, keys in [
        (places[:, :4], places),  # not the last ones
        (places, places[:, 2:]),  # more than the keys
        (places * 2, places * 2),  # gaps
    ]:
        assert not window_varlen.is_packable(queries, keys)
    query, keys = case(places)
    with pytest.raises(InputError, match="varlen needs float16 or bfloat16 on an NVIDIA GPU"):
        window_attention(
            query, places, keys, first_keys(keys, 1), LambdaConfig(4, 1), impl="varlen"
        )


@compiling
@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_where_nothing_can_be_compiled_blocks_serve(monkeypatch):
    """No compiler: a failure is met once, remembered, and does not reach the caller."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    monkeypatch.setattr(window_flex, "_COMPILED", window_flex._Compiled())
    query, keys = case(rows(9, 5, columns=9), dtype=torch.float32)
    given = (query, keys.positions, keys, first_keys(keys, 1))
    scores = Scores(LambdaConfig(4, 1, 4), 4, None, None, 1.0, None)
    assert window_flex.can_flex(query, keys, scores, None)
    torch._dynamo.reset()
    assert window_flex.flex(*given, scores) is None
    monkeypatch.setattr(window_flex._COMPILED, "kernel", None)
    assert window_flex.flex(*given, scores) is None
    with pytest.raises(InputError, match="where torch can compile"):
        window_attention(*given, LambdaConfig(4, 1, 4), impl="flex")
    torch._dynamo.reset()


@pytest.mark.slow
@compiling
@pytest.mark.parametrize("extra", EXTRAS)
def test_compiled_flex_is_the_reference(extra):
    """Grouped keys, padding, one token of window, many sinks, none: few shapes for all lengths."""
    torch._dynamo.reset()
    for (length, short), config in [
        ((300, 170), LambdaConfig(100, 10, 100)),
        ((500, 20), LambdaConfig(100, 10, 50)),
        ((400, 150), LambdaConfig(1, 3, 1)),
        ((260, 260), LambdaConfig(1000, 200, 1000)),
        ((450, 449), LambdaConfig(100, 10, None, "streaming")),
        ((333, 333), LambdaConfig(64, 0)),
    ][: 6 if extra == "rope" else 3]:
        near(*both("flex", rows(length, short, columns=length), config, extra=extra))
    config = LambdaConfig(100, 10, 100)
    near(*both("flex", rows(500, 400, columns=500), config, extra=extra, new=150))
    assert window_flex._COMPILED.works
    torch._dynamo.reset()
