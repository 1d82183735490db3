"""Models that cannot be extended, and wrong use of those that are: one sentence that says why."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models import extend_probe, extension
from memlm.models.extend import extend_context, extended, is_extended, restore_context
from memlm.testing.tiny import tiny_model, tiny_tokens

SETTINGS = {"window": 16, "sinks": 3}


def small(family, **settings):
    """A model of a family that no other test needs."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    sizes |= {"vocab_size": 61, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        family, **sizes, **settings, max_position_embeddings=128, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neo"])
def test_learnt_positions_are_refused(family):
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=rf"a rotary module .* got '{family}'"):
        extend_context(model, **SETTINGS)
    assert not is_extended(model)


def test_latent_attention_is_refused():
    model = small("deepseek_v3", q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
                  qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=2, n_group=1, topk_group=1,
                  num_experts_per_tok=1)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"\(MLA\) of 'deepseek_v3'"):
        extend_context(model, **SETTINGS)


def test_three_dimensional_positions_are_refused():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
    with pytest.raises(UnsupportedModelError, match=r"M-RoPE: time, height, width"):
        extend_context(tiny_model("qwen2", rope_parameters=rope), **SETTINGS)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [2.0] * 2,
         "original_max_position_embeddings": 64},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_length_dependent_rotary_is_refused(rope):
    model = tiny_model("llama", rope_parameters={**rope, "rope_theta": 10000.0})
    with pytest.raises(
        UnsupportedModelError, match=rf"rotary scaling .* got '{rope['rope_type']}'"
    ):
        extend_context(model, **SETTINGS)


def test_learnt_sink_scores_are_refused():
    model = small("gpt_oss", head_dim=4, num_local_experts=2, num_experts_per_tok=1,
                  rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="learnt sink score"):
        extend_context(model, **SETTINGS)
    assert not is_extended(model)


def test_bidirectional_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="attention must be causal"):
        extend_context(tiny_model("gemma3_text", use_bidirectional_attention=True), **SETTINGS)


def test_an_unknown_family_is_taken_if_the_probe_passes():
    model, tokens = tiny_model("olmo"), tiny_tokens(2, 40)
    with torch.inference_mode():
        before = model(tokens).logits
        with extended(model, **SETTINGS):
            after = model(tokens).logits
    torch.testing.assert_close(after[:, :16], before[:, :16], rtol=1e-4, atol=3e-4)
    assert (after - before)[:, 17:].abs().max() > 0.1


def test_an_unknown_family_must_show_that_positions_matter():
    with pytest.raises(UnsupportedModelError, match="nothing can be proved"):
        extend_context(small("olmo"), **SETTINGS)


def test_norms_behind_the_rotation_do_not_pass_the_probe():
    torch.manual_seed(0)
    model = small("hunyuan_v1_dense", head_dim=4, rope_parameters={
        "rope_type": "default", "rope_theta": 10000.0})  # fmt: skip
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            torch.nn.init.normal_(weight)
        elif weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.5)
    with pytest.raises(UnsupportedModelError, match="agree with its own attention"):
        extend_context(model, **SETTINGS)
    assert not is_extended(model)


def test_layers_without_attention_do_not_pass_the_probe():
    model = small("minimax", head_dim=4, num_local_experts=2)
    with pytest.raises(UnsupportedModelError, match="reached in 1, 1 times"):
        extend_context(model, **SETTINGS)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_failed_probe_leaves_the_model_as_it_was(family, monkeypatch):
    model = tiny_model(family)
    modules, implementation = list(model.modules()), model.config._attn_implementation
    monkeypatch.setattr(extension, "window_attention", lambda query, *_, **__: query * 0)
    with pytest.raises(UnsupportedModelError, match="agree with its own attention"):
        extend_context(model, **SETTINGS)
    assert not is_extended(model)
    assert list(model.modules()) == modules
    assert model.config._attn_implementation == implementation


def test_the_probe_sees_whether_anything_is_cut_off(monkeypatch):
    """Attention that agrees within the window and then goes on as before."""
    whole = extend_probe.TRUNCATION.__class__(window=100, sinks=0)
    monkeypatch.setattr(extension.Extension, "seen_by", lambda *_: whole)
    with pytest.raises(UnsupportedModelError, match="see nothing outside its window"):
        extend_context(tiny_model("llama"), **SETTINGS)


def test_settings_that_cannot_be():
    llama = tiny_model("llama")
    with pytest.raises(InputError, match="must be extended, but it is not"):
        restore_context(llama)
    with pytest.raises(InputError, match="window must be at least 1"):
        extend_context(llama, window=0)
    with pytest.raises(InputError, match="middle must be 'dropped'"):
        extend_context(llama, window=4, triangle_offset=1.0)
    with pytest.raises(InputError, match="triangle_offset must not be negative"):
        extend_context(llama, window=4, middle="kept", triangle_offset=-1.0)
    with pytest.raises(InputError, match="own sliding window of 8"):
        extend_context(tiny_model("mistral", sliding_window=8), window=9)
    for family, settings in (("gemma2", {}), ("mistral", {"sliding_window": 8})):
        with pytest.raises(InputError, match="needs a model of full attention"):
            extend_context(tiny_model(family, **settings), window=4, middle="kept")
    extend_context(llama, **SETTINGS)
    with pytest.raises(InputError, match="extended already"):
        extend_context(llama, **SETTINGS)


def test_caches_and_inputs_that_do_not_fit():
    llama, tokens = tiny_model("llama"), tiny_tokens(2, 12)
    foreign = llama(tokens).past_key_values
    extend_context(llama, **SETTINGS)
    with pytest.raises(InputError, match="empty DynamicCache"):
        llama(tokens, past_key_values=foreign)
    with pytest.raises(InputError, match="empty DynamicCache"):
        llama(tokens, past_key_values=StaticCache(config=llama.config, max_cache_len=20))
    with pytest.raises(InputError, match="attention_mask must be"):
        llama(tokens, attention_mask=torch.ones(2, 1, 12, 12))
    with pytest.raises(InputError, match="position_ids must rise by one"):
        llama(tokens, position_ids=torch.arange(6).repeat(2)[None])
    cache = llama(tokens).past_key_values
    with pytest.raises(InputError, match="can take back up to 12 tokens, got 13"):
        cache.crop(-13)
    restore_context(llama)
    with (
        extended(llama, window=4),
        pytest.raises(InputError, match="must come from this model's settings"),
    ):
        llama(tokens, past_key_values=cache)
    with (
        extended(llama, window=4, middle="kept"),
        pytest.raises(InputError, match="keeps no cache"),
    ):
        llama(tokens)


@pytest.mark.parametrize("family", ["llama", "bloom", "gptj"])
def test_dropout_in_training_is_refused(family):
    name = "attn_pdrop" if family == "gptj" else "attention_dropout"
    model = extend_context(tiny_model(family, **{name: 0.1}), **SETTINGS)
    model(tiny_tokens(1, 5))
    with pytest.raises(UnsupportedModelError, match="no dropout"):
        model.train()(tiny_tokens(1, 5))
