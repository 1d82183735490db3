"""Taps read the tensor that enters (or leaves) the last feed-forward, in every family."""

from dataclasses import replace

import pytest
import torch

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.retro.fit import retro_fit
from memlm.models.taps import FAMILIES, Tap, body, capture, find_tap, forward_to_tap
from memlm.testing.tiny import FAMILIES as TINY
from memlm.testing.tiny import PAIR_FAMILIES, tiny_model, tiny_tokens, tiny_translator

ALONE = sorted(set(FAMILIES) & set(TINY))


def hooks(model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def watch(module, seen: list):
    """Record what a module returned, first element if it is a tuple."""
    return module.register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )


def test_every_family_of_the_table_has_a_tiny_model():
    # mBART and M2M-100 are laid out as BART is; RETRO has tests of its own.
    assert set(FAMILIES) - set(TINY) <= {*PAIR_FAMILIES, "mbart", "m2m_100"}


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_the_tap_of_an_encoder_decoder_is_in_its_decoder(family):
    tap = find_tap(tiny_translator(family))
    assert tap.name == "ffn_input"
    assert "decoder" in tap.module


@pytest.mark.parametrize("family", ALONE)
def test_the_key_is_what_the_last_feed_forward_gets(family):
    model, tokens = tiny_model(family), tiny_tokens(2, 9)
    tap = find_tap(model)
    assert tap.name == "ffn_input"
    module = model.get_submodule(tap.module)
    with torch.no_grad(), capture(model, tap) as seen:
        model(tokens)
    assert seen.states.shape == (2, 9, model.config.hidden_size)

    # Replacing the feed-forward's input by other numbers changes the logits: the place matters...
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: (tuple(value + 1 for value in args), kwargs), with_kwargs=True
    )
    with torch.no_grad():
        moved = model(tokens).logits
    handle.remove()
    assert not torch.allclose(moved, model(tokens).logits, atol=1e-3)
    # ... and there is no later one: the block's output minus its feed-forward is upstream of it.
    assert (
        module
        is [
            part
            for name, part in model.named_modules()
            if name.endswith(tap.module.rsplit(".", 1)[1]) and f".{_last(model, tap)}." in name
        ][-1]
    )


def _last(model, tap) -> str:
    return tap.module.rsplit(".", 2)[1]


@pytest.mark.parametrize(
    ("family", "norm"),
    [
        ("llama", "model.layers.1.post_attention_layernorm"),
        ("mistral", "model.layers.1.post_attention_layernorm"),
        ("qwen2", "model.layers.1.post_attention_layernorm"),
        ("gemma2", "model.layers.1.pre_feedforward_layernorm"),
        ("gpt2", "transformer.h.1.ln_2"),
        ("gpt_neo", "transformer.h.1.ln_2"),
        ("gpt_neox", "gpt_neox.layers.1.post_attention_layernorm"),
        ("cohere", "model.layers.1.input_layernorm"),
        ("phi", "model.layers.1.input_layernorm"),
        ("opt", "model.decoder.layers.1.final_layer_norm"),
    ],
)
def test_the_key_is_taken_after_the_norm_before_the_feed_forward(family, norm):
    model, tokens = tiny_model(family), tiny_tokens(2, 9)
    normed: list = []
    handle = watch(model.get_submodule(norm), normed)
    with torch.no_grad():
        states = forward_to_tap(model, find_tap(model), tokens)
    handle.remove()
    assert torch.equal(states, normed[-1].view_as(states))


@pytest.mark.parametrize("family", ALONE)
def test_ffn_output_becomes_the_final_state_under_the_final_norm(family):
    model, tokens = tiny_model(family), tiny_tokens(2, 9)
    with torch.no_grad():
        before = forward_to_tap(model, find_tap(model, "ffn_output"), tokens)
        final = forward_to_tap(model, find_tap(model, "final"), tokens)
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    norm = next(module for name, module in body(model).named_children() if name in names)
    torch.testing.assert_close(norm(before), final)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "mpt"])
@pytest.mark.parametrize("name", ["auto", "final"])
def test_stopping_at_the_tap_gives_the_same_bits_and_leaves_no_hook(family, name):
    model, tokens = tiny_model(family), tiny_tokens(3, 7)
    tap = find_tap(model, name)
    with torch.no_grad():
        early = forward_to_tap(model, tap, tokens)
        with capture(model, tap) as seen:
            model(tokens)
    assert torch.equal(early, seen.states)
    assert hooks(model) == 0


def test_hooks_are_removed_when_the_forward_fails():
    model = tiny_model("llama")
    tap = find_tap(model)
    with pytest.raises(IndexError), capture(model, tap):
        model(torch.tensor([[model.config.vocab_size]]))
    with pytest.raises(IndexError):
        forward_to_tap(model, tap, torch.tensor([[model.config.vocab_size]]))
    assert hooks(model) == 0


def test_unknown_families_fall_back_to_the_final_state():
    model = tiny_model("mpt")
    assert find_tap(model) == Tap("final", "transformer", "output")
    with pytest.raises(UnsupportedModelError, match="'mpt'; use tap='final'"):
        find_tap(model, "ffn_input")


def test_a_model_around_another_has_the_tap_of_the_one_inside():
    model = tiny_model("llama")
    inside = find_tap(model)
    around = find_tap(retro_fit(model, chunk_size=4, cross_attention_layers=(1, 2)))
    assert inside.name == "ffn_input"
    assert around == replace(inside, module=f"base.{inside.module}")


def test_wrong_names_and_models_without_head_are_refused():
    model = tiny_model("llama")
    with pytest.raises(InputError, match="'last_ffn_input'"):
        find_tap(model, "last_ffn_input")
    with pytest.raises(InputError, match="tap must be one of"):
        Tap("middle", "model", "input")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        body(model.model)


def test_a_tap_round_trips():
    tap = find_tap(tiny_model("gpt2"))
    assert Tap.from_dict(tap.to_dict()) == tap
