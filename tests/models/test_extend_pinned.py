"""Sinks that are no prefix: a system prompt in the middle of a text, several spans."""

import pytest
import torch
from torch.testing import assert_close

from memlm.core.errors import InputError
from memlm.models.extend import extend_context, extended
from memlm.models.extension import Extension
from memlm.models.window_file import load_window, save_window
from memlm.ops.middle_rule import MiddleConfig
from memlm.testing.tiny import tiny_model, tiny_tokens

from .lambda_oracle import install

WINDOW, LENGTH = 16, 70
SINKS, PINNED = 3, ((20, 26), (31, 33))
SPANS = [(20, 26), (0, SINKS), (31, 33)]
SETTINGS = {"window": WINDOW, "sinks": SPANS}
TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}
FAMILIES = ["llama", "gemma2", "cohere2", "bloom", "gptj"]


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_oracle(family, monkeypatch):
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    limits, outputs = (WINDOW, 5, 30, None), []
    for limit in limits:
        with extended(model, **SETTINGS, distance_limit=limit):
            outputs.append(logits(model, tokens, use_cache=False))
    with extended(model, window=WINDOW, sinks=SINKS):
        assert (logits(model, tokens) - outputs[0])[:, 26 + WINDOW :].abs().max() > 0.01
    extend_context(model, **SETTINGS)
    for limit, output in zip(limits, outputs, strict=True):
        install(monkeypatch, Extension, window=WINDOW, sinks=SINKS, limit=limit, pinned=PINNED)
        assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", ["window", 30, None])
def test_pieces_and_single_tokens_are_one_long_forward(family, limit, tmp_path):
    """Also over a file, and after tokens of a span were taken back."""
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    extend_context(model, **SETTINGS, distance_limit=limit)
    whole = logits(model, tokens, use_cache=False)
    for pieces in ([LENGTH], [22, 1, 2, 30, 15], [1] * LENGTH):
        cache, rows = None, []
        for piece in tokens.split(pieces, dim=1):
            with torch.inference_mode():
                output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits)
        assert_close(torch.cat(rows, dim=1), whole, **TOLERANCE)
    with torch.inference_mode():
        cache = model(tokens[:, :22], use_cache=True).past_key_values
        model(tiny_tokens(2, 6, seed=1), past_key_values=cache, use_cache=True)
        cache.crop(-6)
        save_window(cache, tmp_path / "cache", model)
        cache, _, _ = load_window(tmp_path / "cache", model)
        rows = model(tokens[:, 22:], past_key_values=cache, use_cache=True).logits
    assert_close(rows, whole[:, 22:], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_row(family):
    """Left and right padding, prefill and beams."""
    lengths, width = (60, 24, 41), 60
    tokens = tiny_tokens(3, width)
    model = extend_context(tiny_model(family), **SETTINGS)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": 2}
    for side in ("left", "right"):
        mask = torch.zeros(3, width, dtype=torch.long)
        rows = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
        for row, part in enumerate(rows):
            mask[row, part] = 1
        together = logits(model, tokens * mask, attention_mask=mask)
        for row, part in enumerate(rows):
            alone = logits(model, tokens[row : row + 1, part])
            assert_close(together[row : row + 1, part], alone, **TOLERANCE)
        if side == "left":
            written = model.generate(tokens * mask, attention_mask=mask, use_cache=True, **settings)
            for row, part in enumerate(rows):
                alone = model.generate(tokens[row : row + 1, part], use_cache=True, **settings)
                assert torch.equal(written[row, -20:], alone[0, -20:])


def test_only_what_is_pinned_stays_in_sight():
    model = tiny_model("llama", num_hidden_layers=1)
    tokens = tiny_tokens(1, LENGTH)
    for at, seen in ((19, False), (20, True), (25, True), (26, False), (32, True)):
        other = tokens.clone()
        other[0, at] = 3 + (tokens[0, at] - 2) % 50
        with extended(model, **SETTINGS):
            changed = (logits(model, tokens) != logits(model, other)).any(-1)[0, at + WINDOW :]
        assert changed.all() if seen else not changed.any()


def test_what_cannot_be_pinned():
    model = tiny_model("llama")
    for sinks, words in [
        ([(20, 10)], "begin < end"),
        ([(0, 4), (2, 8)], "behind the first 4 tokens"),
        ([(1, 2, 3)], "must be a number or pairs"),
        ([("a", "b")], "must be a number or pairs"),
    ]:
        with pytest.raises(InputError, match=words):
            extend_context(model, window=8, sinks=sinks)
    with pytest.raises(InputError, match="counts what is kept"):
        extend_context(model, window=8, sinks=SPANS, clamp="streaming")
    for middle in ("kept", MiddleConfig(k=16, first_layer=0, block=4)):
        with pytest.raises(InputError, match="pinned spans need middle='dropped'"):
            extend_context(model, window=8, sinks=SPANS, middle=middle)
    extend_context(model, **SETTINGS)
    cache = model(tiny_tokens(1, 30)).past_key_values
    with (
        extended(tiny_model("llama"), window=WINDOW, sinks=SINKS) as other,
        pytest.raises(InputError, match="must come from this model's settings"),
    ):
        other(tiny_tokens(1, 3), past_key_values=cache)
