"""Extended models: decoding, turns, the rule's variants, training, copies, other parts of memlm."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache

from memlm.memory.local import LocalMemory
from memlm.models import extension
from memlm.models.attach import attach
from memlm.models.extend import extend_context, extended, is_extended, restore_context
from memlm.models.window_cache import SPARE
from memlm.testing.tiny import tiny_model, tiny_tokens

WINDOW, SINKS = 16, 3
SETTINGS = {"window": WINDOW, "sinks": SINKS}
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@pytest.fixture
def llama():
    return tiny_model("llama")


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


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_decoding_is_one_long_forward_and_the_cache_stays_small(family):
    model = tiny_model(family)
    tokens = tiny_tokens(2, 300)
    extend_context(model, **SETTINGS)
    whole = logits(model, tokens, use_cache=False)
    assert_close(logits(model, tokens, use_cache=True), whole, rtol=0, atol=0)
    for first in (1, 40):
        rows, cache = steps(model, tokens, first)
        assert_close(rows, whole, **TOLERANCE)
        assert cache.get_seq_length() == 300
        for layer in cache.layers:
            held = layer.config.sinks + layer.config.window + SPARE + 1
            assert layer.keys.shape[2] == layer.values.shape[2] == held


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


def test_greedy_search_with_and_without_cache(llama):
    model = extend_context(llama, **SETTINGS)
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


def test_the_context_manager_restores_after_an_error(llama):
    with pytest.raises(KeyError), extended(llama, **SETTINGS):
        raise KeyError
    assert not is_extended(llama)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_it_trains_also_with_checkpointing(family):
    tokens = tiny_tokens(2, 40)
    dropout = {"resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0} if family == "gptj" else {}
    model = extend_context(tiny_model(family, **dropout), **SETTINGS).train()
    first = extension.attention_layers(model.get_decoder())[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append(first.k_proj.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    assert_close(*gradients)


@pytest.mark.parametrize("family", ["llama", "gptj", "falcon"])
def test_copies_and_saved_models_stand_alone(family, tmp_path):
    model, tokens = tiny_model(family), tiny_tokens(1, 40)
    original = logits(model, tokens)
    extend_context(model, **SETTINGS)
    rows = logits(model, tokens)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    restore_context(model)
    assert torch.equal(logits(twin, tokens), rows)
    assert torch.equal(logits(restore_context(twin), tokens), original)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, tokens), original)
    assert torch.equal(logits(extend_context(loaded, **SETTINGS), tokens), rows)


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3_text"])
def test_models_of_one_configuration_do_not_disturb_each_other(family):
    first, tokens = tiny_model(family), tiny_tokens(1, 40)
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    assert second.config is first.config
    original = logits(second, tokens)
    rows = logits(extend_context(first, **SETTINGS), tokens)
    assert torch.equal(logits(second, tokens), original)
    extend_context(second, **SETTINGS)
    restore_context(first)
    assert torch.equal(logits(second, tokens), rows)
    assert torch.equal(logits(first, tokens), original)


@pytest.mark.parametrize("family", ["gptj", "bloom", "gemma3_text"])
def test_the_original_moves_along_with_an_extended_model(family):
    """What is done to parameters and buffers meanwhile is done to the modules that come back."""
    model, tokens = tiny_model(family), tiny_tokens(1, 40)
    expected = logits(copy.deepcopy(model).double(), tokens)
    extend_context(model, **SETTINGS).double().train().eval()
    assert logits(model, tokens).dtype == torch.float64
    assert torch.equal(logits(restore_context(model), tokens), expected)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_memory_can_be_attached_too(family):
    llama = extend_context(tiny_model(family), **SETTINGS)
    prompt = tiny_tokens(2, 30)
    lm = attach(llama, LocalMemory(size=64))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    generated = lm.generate(prompt, **settings)
    again = lm(generated[:, :-1]).logits[:, 29:]
    again[..., 2] = -torch.inf
    assert torch.equal(again.argmax(-1), generated[:, 30:])


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "gemma2"])
def test_gradients_are_those_of_the_reference(family):
    model, tokens, gradients = tiny_model(family), tiny_tokens(2, 40), []
    for impl in ("auto", "reference"):
        model.zero_grad()
        with extended(model, **SETTINGS, impl=impl):
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients[0])
    for fast, slow in zip(*gradients, strict=True):
        assert_close(fast, slow, rtol=1e-3, atol=1e-4 * float(slow.abs().max()) + 1e-7)


class LowRank(nn.Module):
    """A frozen layer and a product of two thin matrices beside it (LoRA, Hu et al. 2022)."""

    def __init__(self, frozen, rank=2):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(x))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_low_rank_fine_tuning_beyond_the_window(family):
    model, tokens = tiny_model(family).requires_grad_(False), tiny_tokens(2, 40)
    torch.manual_seed(0)
    for layer in extension.attention_layers(model.get_decoder()):
        layer.q_proj, layer.k_proj = LowRank(layer.q_proj), LowRank(layer.k_proj)
    extend_context(model, **SETTINGS)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(8):
        loss = model.train()(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(trained) == 8
    assert losses[-1] < losses[0] - 0.1


def test_a_pinned_system_prompt_stays_in_sight():
    """As many sinks as it has tokens; without a limit they keep their order."""
    model, prompt = tiny_model("llama", num_hidden_layers=1), 7
    tokens, other = tiny_tokens(1, 60), tiny_tokens(1, 60)
    other[0, prompt - 1] = 3 + (tokens[0, prompt - 1] - 2) % 50
    for sinks, seen in ((prompt, True), (prompt - 1, False)):
        with extended(model, window=16, sinks=sinks, distance_limit=None):
            rows = [logits(model, each)[0, prompt + 16 :] for each in (tokens, other)]
        assert bool((rows[0] != rows[1]).any(-1).all()) is seen


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_middle_that_is_kept(family):
    """Without a limit it is the model's own attention; with one, far tokens stop moving away."""
    model, tokens = tiny_model(family), tiny_tokens(2, 40)
    before = logits(model, tokens)
    with extended(model, **SETTINGS, middle="kept", distance_limit=None):
        assert_close(logits(model, tokens, use_cache=False), before, **TOLERANCE)
    with extended(model, window=8, middle="kept", distance_limit=40, triangle_offset=0.0):
        assert_close(logits(model, tokens, use_cache=False), before, **TOLERANCE)
    with extended(model, **SETTINGS, middle="kept", distance_limit=12):
        limited = logits(model, tokens, use_cache=False)
    assert_close(limited[:, :13], before[:, :13], **TOLERANCE)
    assert (limited - before)[:, 13:].abs().max() > 0.1


def test_a_middle_that_is_kept_and_padding(llama):
    tokens, mask = tiny_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, :12] = 0
    extend_context(llama, window=8, sinks=2, middle="kept", triangle_offset=1.0)
    together = logits(llama, tokens * mask, attention_mask=mask, use_cache=False)
    alone = logits(llama, tokens[1:, 12:], use_cache=False)
    assert_close(together[1:, 12:], alone, **TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
@pytest.mark.parametrize("place", ["dispatched", "offloaded", "on disk"])
def test_models_that_accelerate_has_placed(family, place, tmp_path):
    tokens, model = tiny_tokens(1, 40), tiny_model(family)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "use_cache": True}
    before = logits(model, tokens)
    with extended(model, **SETTINGS):
        expected, written = logits(model, tokens), model.generate(tokens, **settings)
    if place == "offloaded":
        cpu_offload(model, execution_device=torch.device("cpu"))
    elif place == "on disk":
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    with extended(model, **SETTINGS):
        assert torch.equal(logits(model, tokens), expected)
        assert torch.equal(model.generate(tokens, **settings), written)
    assert torch.equal(logits(model, tokens), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_weights_of_eight_bits(family):
    """torch's own dynamic quantisation of all linear layers, before or after the extension."""
    tokens, outputs = tiny_tokens(2, 60), []
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "use_cache": True}
    for before in (True, False):
        model = tiny_model(family)
        if not before:
            extend_context(model, **SETTINGS)
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        if before:
            extend_context(model, **SETTINGS)
        assert not any(type(module) is nn.Linear for module in model.modules())
        whole = logits(model, tokens)
        # activations are quantised by the range of a call, so pieces agree in the rough only
        rows, _ = steps(model, tokens, 30)
        assert (rows - whole).norm() < 0.2 * whole.norm()
        outputs.append((whole, model.generate(tokens, **settings)))
    assert all(map(torch.equal, *outputs))
