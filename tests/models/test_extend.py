"""Extended models: every family against a float64 oracle, decoding, padding, undoing, refusals."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.memory.local import LocalMemory
from memlm.models import extend
from memlm.models.attach import attach
from memlm.models.extend import extend_context, extended, is_extended, restore_context
from memlm.testing.tiny import tiny_model, tiny_tokens

WINDOW, SINKS = 16, 3
SETTINGS = {"window": WINDOW, "sinks": SINKS}
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@pytest.fixture(params=extend.FAMILIES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def llama():
    return tiny_model("llama")


def oracle(frequencies):
    """Lambda attention on unrotated q, k, v by its definition, in float64, half-split rotary."""

    def attend(
        query, positions, keys, sinks, config, *, rotate=None, scale=None, softcap=None, **_
    ):
        turned = 2 * len(frequencies)
        groups = query.shape[1] // keys.key.shape[1]
        key = keys.key.double().repeat_interleave(groups, 1)
        value = keys.value.double().repeat_interleave(groups, 1)
        distance = positions[:, :, None] - keys.positions[:, None, :]
        seen = (distance >= 0) & (distance < config.window)
        far = (distance >= config.window) & (keys.positions < config.sinks)[:, None, :]
        limit = config.distance_limit or distance.shape[1]
        distance = torch.where(far, distance.clamp(max=limit), distance)
        angles = distance[:, None, :, :, None] * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        x = query.double()[:, :, :, None, :turned]
        half = torch.cat([-x[..., turned // 2 :], x[..., : turned // 2]], dim=-1)
        x = x * angles.cos() + half * angles.sin()
        passed = query.double()[:, :, :, None, turned:].expand(*x.shape[:-1], -1)
        scores = (torch.cat([x, passed], dim=-1) * key[:, :, None]).sum(-1) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~(seen | far)[:, None], -torch.inf)
        return (scores.softmax(-1) @ value).to(query.dtype)

    return attend


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


def steps(model, tokens, first):
    """Logits of a prompt of ``first`` tokens, then one token at a time."""
    with torch.inference_mode():
        output = model(tokens[:, :first], use_cache=True)
        rows = [output.logits]
        for column in range(first, tokens.shape[1]):
            cache = output.past_key_values
            output = model(tokens[:, column : column + 1], past_key_values=cache)
            rows.append(output.logits)
    return torch.cat(rows, dim=1), output.past_key_values


@pytest.mark.parametrize("limit", ["window", 5, 30, None])
def test_it_is_lambda_attention(model, limit, monkeypatch):
    tokens = tiny_tokens(2, 50)
    frequencies = model.model.rotary_emb.inv_freq.double() if hasattr(model, "model") else (
        model.gpt_neox.rotary_emb.inv_freq.double()
    )  # fmt: skip
    extend_context(model, **SETTINGS, distance_limit=limit)
    output = logits(model, tokens, use_cache=False)
    monkeypatch.setattr(extend, "window_attention", oracle(frequencies))
    assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)


def test_nothing_changes_within_the_window_and_much_beyond(model):
    tokens = tiny_tokens(2, 50)
    before = logits(model, tokens)
    with extended(model, **SETTINGS):
        after = logits(model, tokens)
    # at distance `window` a sink is still where it was
    assert_close(after[:, : WINDOW + 1], before[:, : WINDOW + 1], **TOLERANCE)
    assert (after - before)[:, WINDOW + 1 :].abs().max() > 0.1


def test_decoding_is_one_long_forward_and_the_cache_stays_small(model):
    tokens = tiny_tokens(2, 300)
    extend_context(model, **SETTINGS)
    whole = logits(model, tokens, use_cache=False)
    assert_close(logits(model, tokens, use_cache=True), whole, rtol=0, atol=0)
    for first in (1, 40):
        rows, cache = steps(model, tokens, first)
        assert_close(rows, whole, **TOLERANCE)
        assert cache.get_seq_length() == 300
        for layer in cache.layers:
            assert layer.keys.shape[2] == layer.values.shape[2] == SINKS + WINDOW - 1


@pytest.mark.parametrize("pieces", [[7] * 8, [1, 2, 50, 3], [30, 26]])
def test_a_prompt_may_come_in_pieces(llama, pieces):
    tokens = tiny_tokens(2, sum(pieces))
    extend_context(llama, **SETTINGS)
    cache, rows = DynamicCache(config=llama.config), []
    for piece in tokens.split(pieces, dim=1):
        rows.append(logits(llama, piece, past_key_values=cache))
    assert_close(torch.cat(rows, dim=1), logits(llama, tokens), **TOLERANCE)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 2), (4, 0), (4, 9)])
def test_extreme_settings_decode_too(llama, window, sinks):
    tokens = tiny_tokens(2, 25)
    extend_context(llama, window=window, sinks=sinks)
    assert_close(steps(llama, tokens, 2)[0], logits(llama, tokens), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(model, side):
    lengths, width = (50, 31, 2), 50
    tokens = tiny_tokens(3, width)
    mask = torch.zeros_like(tokens)
    rows = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, part in enumerate(rows):
        mask[row, part] = 1
    extend_context(model, **SETTINGS)
    together = logits(model, tokens * mask, attention_mask=mask)
    assert together.isfinite().all()
    for row, part in enumerate(rows):
        alone = logits(model, tokens[row : row + 1, part])
        assert_close(together[row : row + 1, part], alone, **TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_padded_batch_is_generated_as_its_rows_are(model, beams):
    lengths, width = (24, 3), 24
    tokens, mask = tiny_tokens(2, width), torch.zeros(2, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    extend_context(model, **SETTINGS)
    settings = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    settings |= {"num_beams": beams}
    together = model.generate(tokens * mask, attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, -length:], **settings)
        assert torch.equal(together[row, -30:], alone[0, -30:])


def test_greedy_search_with_and_without_cache(model):
    extend_context(model, **SETTINGS)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    prompt = tiny_tokens(2, 10)
    cached = model.generate(prompt, **settings)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **settings))


def test_turns_with_padding_between_them(llama):
    """Right-padded prompts, then more tokens: padding inside the cache."""
    first, second = tiny_tokens(2, 40), tiny_tokens(2, 20, seed=1)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 5:40] = 0
    extend_context(llama, **SETTINGS)
    cache = DynamicCache(config=llama.config)
    logits(llama, first, attention_mask=mask[:, :40], past_key_values=cache)
    rows = logits(llama, second, attention_mask=mask, past_key_values=cache)
    alone = torch.cat([first[1:, :5], second[1:]], dim=1)
    assert_close(rows[1:], logits(llama, alone)[:, 5:], **TOLERANCE)


def test_what_the_window_has_left_is_forgotten():
    model = tiny_model("llama", num_hidden_layers=1)
    extend_context(model, **SETTINGS)
    tokens = tiny_tokens(1, 40)
    other, sink = tokens.clone(), tokens.clone()
    other[0, 10] = 3 + (tokens[0, 10] - 2) % 50
    sink[0, 1] = 3 + (tokens[0, 1] - 2) % 50
    rows = logits(model, tokens)
    changed = (rows != logits(model, other)).any(-1)[0]
    assert not changed[:10].any()
    assert changed[10]
    assert not changed[10 + WINDOW :].any()
    assert (rows != logits(model, sink)).any(-1)[0, 1 + WINDOW :].all()


def test_original_clamp_depends_on_the_length_and_ours_does_not(llama):
    tokens = tiny_tokens(1, 50)
    for clamp, same in (("causal", True), ("original", False)):
        with extended(llama, **SETTINGS, distance_limit=45, clamp=clamp):
            rows = [logits(llama, tokens[:, :n])[:, :30] for n in (30, 50)]
        assert torch.allclose(*rows, atol=1e-4) is same


def test_restoring_gives_back_the_identical_model(model):
    tokens = tiny_tokens(2, 40)
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


def test_the_context_manager_restores_after_an_error(llama):
    with pytest.raises(KeyError), extended(llama, **SETTINGS):
        raise KeyError
    assert not is_extended(llama)


def test_it_trains_also_with_checkpointing(llama):
    tokens = tiny_tokens(2, 40)
    extend_context(llama, **SETTINGS)
    gradients = []
    for checkpointing in (False, True):
        model = llama.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert_close(*gradients)


def test_copies_and_saved_models_stand_alone(llama, tmp_path):
    tokens = tiny_tokens(1, 40)
    original = logits(llama, tokens)
    extend_context(llama, **SETTINGS)
    rows = logits(llama, tokens)
    twin = copy.deepcopy(llama)
    llama.save_pretrained(tmp_path)
    restore_context(llama)
    assert torch.equal(logits(twin, tokens), rows)
    assert torch.equal(logits(restore_context(twin), tokens), original)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), original)
    assert torch.equal(logits(extend_context(loaded, **SETTINGS), tokens), rows)


def test_half_precision(llama):
    tokens = tiny_tokens(2, 40)
    model = copy.deepcopy(llama).to(torch.bfloat16)
    extend_context(model, **SETTINGS)
    assert logits(model, tokens).isfinite().all()


def test_yarn_scales_both_sides():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = tiny_model("llama", rope_parameters=rope)
    tokens = tiny_tokens(2, 30)
    before = logits(model, tokens)
    with extended(model, window=30, sinks=3):
        assert_close(logits(model, tokens), before, **TOLERANCE)


def test_a_memory_can_be_attached_too(llama):
    extend_context(llama, **SETTINGS)
    prompt = tiny_tokens(2, 30)
    lm = attach(llama, LocalMemory(size=64))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    generated = lm.generate(prompt, **settings)
    again = lm(generated[:, :-1]).logits[:, 29:]
    again[..., 2] = -torch.inf
    assert torch.equal(again.argmax(-1), generated[:, 30:])


@pytest.mark.parametrize("family", ["gpt2", "gptj", "bloom", "falcon", "gemma3_text", "cohere2"])
def test_other_families_are_refused(family):
    with pytest.raises(UnsupportedModelError, match=f"got '{family}'"):
        extend_context(tiny_model(family), **SETTINGS)


def test_length_dependent_rotary_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match=r"rotary scaling .* got 'dynamic'"):
        extend_context(tiny_model("llama", rope_parameters=rope), **SETTINGS)


def test_a_failed_probe_leaves_the_model_as_it_was(llama, monkeypatch):
    monkeypatch.setattr(extend, "window_attention", lambda query, *_, **__: query * 0)
    with pytest.raises(UnsupportedModelError, match="agree with its own attention"):
        extend_context(llama, **SETTINGS)
    assert not is_extended(llama)
    assert llama.config._attn_implementation == "sdpa"


def test_wrong_use_is_refused(llama):
    tokens = tiny_tokens(2, 12)
    with pytest.raises(InputError, match="must be extended, but it is not"):
        restore_context(llama)
    with pytest.raises(InputError, match="window must be at least 1"):
        extend_context(llama, window=0)
    with pytest.raises(InputError, match="own sliding window of 8"):
        extend_context(tiny_model("mistral", sliding_window=8), window=9)
    foreign = llama(tokens).past_key_values
    extend_context(llama, **SETTINGS)
    with pytest.raises(InputError, match="extended already"):
        extend_context(llama, **SETTINGS)
    with pytest.raises(InputError, match="empty DynamicCache"):
        llama(tokens, past_key_values=foreign)
    with pytest.raises(InputError, match="empty DynamicCache"):
        llama(tokens, past_key_values=StaticCache(config=llama.config, max_cache_len=20))
    with pytest.raises(InputError, match="attention_mask must be"):
        llama(tokens, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(InputError, match="position_ids must rise by one"):
        llama(tokens, position_ids=torch.arange(6).repeat(2)[None])
    with pytest.raises(UnsupportedModelError, match="cannot take back tokens"):
        llama(tokens).past_key_values.crop(-2)
    cache = llama(tokens).past_key_values
    restore_context(llama)
    extend_context(llama, window=4)
    with pytest.raises(InputError, match="must come from this model's settings"):
        llama(tokens, past_key_values=cache)


def test_dropout_is_refused():
    model = tiny_model("llama", attention_dropout=0.1)
    extend_context(model, **SETTINGS)
    with pytest.raises(UnsupportedModelError, match="no dropout"):
        model.train()(tiny_tokens(1, 5))
