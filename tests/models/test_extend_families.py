"""Every family that can be extended: the same laws, and a float64 oracle by definition."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from memlm.models.extend import extend_context, extended, is_extended, restore_context
from memlm.models.extend_families import FAMILIES
from memlm.models.extension import Extension
from memlm.testing.tiny import tiny_model, tiny_tokens

from .lambda_oracle import install

WINDOW, SINKS, LENGTH = 16, 3, 50
SETTINGS = {"window": WINDOW, "sinks": SINKS}
TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0,
        "original_max_position_embeddings": 32}  # fmt: skip
# (family, settings): quirks that a family's ordinary tiny model does not have
VARIANTS = [
    ("llama", {"rope_parameters": YARN}),
    ("falcon", {"alibi": True}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("mpt", {"attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3}}),
    ("bloom", {"n_head": 6, "hidden_size": 24}),
    ("mistral", {"sliding_window": WINDOW}),
    ("stablelm", {"qk_layernorm": True}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 2}),
]


@pytest.fixture(params=[(family, {}) for family in FAMILIES] + VARIANTS, ids=lambda case: (
    "-".join([case[0], *case[1]])))  # fmt: skip
def model(request):
    family, settings = request.param
    return tiny_model(family, **settings)


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


def in_pieces(model, tokens, pieces, cache=None):
    """Logits of all tokens, read in pieces, and the last cache."""
    rows = []
    for piece in tokens.split(pieces, dim=1):
        with torch.inference_mode():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits)
    return torch.cat(rows, dim=1), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_lambda_attention(family, monkeypatch):
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    limits, outputs = (WINDOW, 5, 30, None), []
    for limit in limits:
        with extended(model, **SETTINGS, distance_limit=limit):
            outputs.append(logits(model, tokens, use_cache=False))
    extend_context(model, **SETTINGS)
    for limit, output in zip(limits, outputs, strict=True):
        install(monkeypatch, Extension, **SETTINGS, limit=limit)
        assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_positions_are_those_among_the_kept(family, monkeypatch):
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    with extended(model, **SETTINGS):
        other = logits(model, tokens, use_cache=False)
    extend_context(model, **SETTINGS, clamp="streaming")
    output = logits(model, tokens, use_cache=False)
    assert_close(in_pieces(model, tokens, [20, 29, 1], DynamicCache())[0], output, **TOLERANCE)
    install(monkeypatch, Extension, **SETTINGS, limit=None, streaming=True)
    assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)
    # layers of Cohere 2 that see sinks have no positions
    assert family == "cohere2" or (output - other)[:, WINDOW + SINKS :].abs().max() > 1e-3


def test_falcon_with_alibi_is_lambda_attention(monkeypatch):
    model, tokens = tiny_model("falcon", alibi=True), tiny_tokens(2, LENGTH)
    extend_context(model, **SETTINGS, distance_limit=20)
    output = logits(model, tokens)
    install(monkeypatch, Extension, **SETTINGS, limit=20)
    assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)


def test_nothing_changes_within_the_window_and_much_beyond(model):
    tokens = tiny_tokens(2, LENGTH)
    before = logits(model, tokens)
    with extended(model, **SETTINGS):
        after = logits(model, tokens)
    # at distance `window` a sink is still where it was
    assert_close(after[:, :WINDOW], before[:, :WINDOW], **TOLERANCE)
    assert (after - before)[:, WINDOW + 1 :].abs().max() > 0.01


def test_pieces_and_single_tokens_are_one_long_forward(model):
    tokens = tiny_tokens(2, LENGTH)
    extend_context(model, **SETTINGS)
    whole = logits(model, tokens, use_cache=False)
    for pieces in ([LENGTH], [1, 22, 7, 20], [3] + [1] * (LENGTH - 3)):
        output, cache = in_pieces(model, tokens, pieces)
        assert_close(output, whole, **TOLERANCE)
        assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(model, side):
    lengths, width = (40, 2, 25), 40
    tokens, mask = tiny_tokens(3, width), torch.zeros(3, width, dtype=torch.long)
    rows = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, part in enumerate(rows):
        mask[row, part] = 1
    extend_context(model, **SETTINGS)
    together = logits(model, tokens * mask, attention_mask=mask)
    assert together.isfinite().all()
    for row, part in enumerate(rows):
        alone = logits(model, tokens[row : row + 1, part])
        assert_close(together[row : row + 1, part], alone, **TOLERANCE)


def test_a_padded_batch_is_generated_with_beams_as_its_rows_are(model):
    lengths, new = (20, 3), 8
    tokens, mask = tiny_tokens(2, lengths[0]), torch.zeros(2, lengths[0], dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    extend_context(model, **SETTINGS)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 2}
    settings |= {"use_cache": True}
    together = model.generate(tokens * mask, attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], **settings)
        assert torch.equal(together[row, -new:], alone[0, -new:])


def test_restoring_gives_back_the_identical_model(model):
    tokens = tiny_tokens(2, 30)
    modules, state = dict(model.named_modules()), set(model.state_dict())
    before = logits(model, tokens)
    implementation = model.config._attn_implementation
    assert extend_context(model, **SETTINGS) is model
    assert is_extended(model)
    assert set(model.state_dict()) == state
    assert restore_context(model) is model
    assert not is_extended(model)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())
    assert len(after) == len(modules)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, tokens), before)


def test_bfloat16(model):
    """The probe compares with the model's own attention; here decoding with the whole."""
    tokens = tiny_tokens(2, 30)
    model = extend_context(model.to(torch.bfloat16), **SETTINGS)
    whole, cache, rows = logits(model, tokens, use_cache=False), None, []
    for piece in tokens.split(10, dim=1):
        with torch.inference_mode():
            output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits)
    rows = torch.cat(rows, dim=1)
    assert rows.dtype == torch.bfloat16
    off = (rows - whole).float().norm(dim=-1) / whole.float().norm(dim=-1)
    # rounding can send a token to another expert of a mixture
    assert off.median() < 0.05
