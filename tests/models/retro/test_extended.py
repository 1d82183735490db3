"""Models that read neighbours, with Lambda attention: both at once, in float64, by definition."""

import pytest
import torch
from torch.testing import assert_close

import memlm
from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.extend import extended, restore_context
from memlm.models.extension import Extension
from memlm.models.retro.fit import retro_fit
from memlm.testing.tiny import tiny_model
from tests.models.lambda_oracle import install
from tests.models.retro.small import CHUNK, POST_NORM, Arithmetic, made_up, small_model

WINDOW, SINKS, LENGTH = 6, 2, 5 * CHUNK + 3
SETTINGS = {"window": WINDOW, "sinks": SINKS}
EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROUNDED = {"atol": 2e-5, "rtol": 1e-3}  # families of transformers have positions in float32
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = ["retro", "post-norm", "llama", "gpt_neox", "gptj", "bloom", "falcon"]


def reader(kind):
    """A model in float64 that reads neighbours, and the one whose self-attention it has."""
    if kind == "retro":
        return small_model()
    if kind == "post-norm":
        return small_model(**POST_NORM)
    torch.manual_seed(0)
    base = tiny_model(kind).double()
    model = retro_fit(base, chunk_size=CHUNK, cross_attention_layers=(1, 2), initializer="torch")
    with torch.no_grad():
        for gate in model.gates.values():
            gate.fill_(0.8)
    return model.eval()


@pytest.fixture(params=KINDS)
def model(request):
    return reader(request.param)


def tolerance(model):
    return EXACT if model.config.model_type == "memlm_retro" else ROUNDED


def given(batch=2, time=LENGTH):
    tokens, neighbours, mask = made_up(batch, time)
    return tokens, {"neighbours": neighbours, "neighbour_mask": mask}


def logits(model, tokens, **inputs):
    with torch.no_grad():
        return model(tokens, **inputs).logits


def in_pieces(model, tokens, pieces):
    """Logits of all tokens read in pieces, as ``generate`` reads them, and the cache."""
    cache, end, rows = None, 0, []
    for piece in pieces:
        end += piece
        with torch.no_grad():
            ready = model.prepare_inputs_for_generation(
                tokens[:, :end],
                past_key_values=cache,
                next_sequence_length=None if cache is None else piece,
                retriever=Arithmetic(),
            )
            output = model(**{**ready, "use_cache": True})
        cache = output.past_key_values
        rows.append(output.logits)
    return torch.cat(rows, dim=1), cache


def test_it_is_lambda_attention_between_the_neighbours(model, monkeypatch):
    tokens, found = given()
    before = logits(model, tokens, **found)
    memlm.extend_context(model, **SETTINGS)
    output = logits(model, tokens, use_cache=False, **found)
    alone = logits(model, tokens, use_cache=False)
    assert_close(output[:, :WINDOW], before[:, :WINDOW], **tolerance(model))
    assert (output - before)[:, WINDOW + SINKS :].abs().max() > 1e-3
    assert (output - alone)[:, CHUNK - 1 :].abs().amax((0, 2)).min() > 1e-4
    install(monkeypatch, Extension, **SETTINGS, limit=WINDOW)
    expected = logits(model, tokens, use_cache=False, **found)
    assert_close(output, expected, **tolerance(model))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [5, 1, 1, 9, 7], [LENGTH]])
def test_prefill_chunks_and_steps_are_one(model, pieces):
    memlm.extend_context(model, **SETTINGS)
    tokens = given()[0]
    with torch.no_grad():
        whole = model.prepare_inputs_for_generation(tokens, retriever=Arithmetic())
        expected = model(**{**whole, "use_cache": False}).logits
    assert_close(in_pieces(model, tokens, pieces)[0], expected, **tolerance(model))


def test_the_cache_is_constant(model):
    memlm.extend_context(model, **SETTINGS)
    tokens = made_up(1, 200)[0]

    def numbers(cache):
        held = [cache.tail, cache.current]
        held += [part for layer in cache.layers for part in (layer.keys, layer.values)]
        held += [
            part
            for memory in cache.neighbours.values()
            for part in (memory.key, memory.value, memory.visible)
        ]
        return sum(part.numel() for part in held)

    few, many = (in_pieces(model, tokens[:, :n], [n - 5] + [1] * 5)[1] for n in (40, 200))
    assert (few.get_seq_length(), many.get_seq_length()) == (40, 200)
    assert numbers(few) == numbers(many)


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}, {"align": "right"}])
def test_generate_with_cache_and_without(model, choice):
    memlm.extend_context(model, **SETTINGS)
    tokens = made_up(2, 14)[0]
    real = torch.ones_like(tokens)
    real[1, :3] = 0
    written = [
        model.generate(
            tokens,
            retriever=Arithmetic(),
            attention_mask=real,
            max_new_tokens=9,
            use_cache=use_cache,
            **QUIET,
            **choice,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*written)


def test_padding_changes_nothing(model):
    memlm.extend_context(model, **SETTINGS)
    tokens, found = given(1)
    expected = logits(model, tokens, use_cache=False, **found)
    padded = torch.cat([tokens.new_zeros(1, 3), tokens], dim=1)
    real = torch.ones_like(padded)
    real[:, :3] = 0
    output = logits(model, padded, attention_mask=real, **found)[:, 3:]
    assert_close(output, expected, **tolerance(model))


def test_restored_it_is_the_same_model(model):
    tokens, found = given()
    before, modules = logits(model, tokens, **found), list(model.modules())
    memlm.extend_context(model, **SETTINGS)
    with pytest.raises(InputError, match="must not be extended already"):
        memlm.extend_context(model, **SETTINGS)
    restore_context(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(logits(model, tokens, **found), before)


def test_a_long_prompt_without_neighbours_is_read_in_chunks():
    model = small_model()
    tokens = made_up(1, 40)[0]
    memlm.extend_context(model, **SETTINGS)
    expected = logits(model, tokens)[:, -1:]
    restore_context(model)
    read = []
    memlm.extend_context(model, **SETTINGS, chunk=12)
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: read.append(output.shape[1])
    )
    with torch.no_grad():
        output = model(input_ids=tokens, logits_to_keep=1).logits
    assert_close(output, expected, **EXACT)
    handle.remove()
    assert read == [4, 12, 12, 12]


def test_a_long_prompt_with_neighbours_is_read_at_once():
    """The hooks that read neighbours are made for the whole text."""
    model = reader("llama")
    tokens, found = given(1, 40)
    with extended(model, **SETTINGS):
        expected = logits(model, tokens, logits_to_keep=1, **found)
    with extended(model, **SETTINGS, chunk=12):
        assert torch.equal(logits(model, tokens, logits_to_keep=1, **found), expected)
        alone = logits(model, tokens, logits_to_keep=1)
    assert (alone - expected).abs().max() > 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_trained_gets_its_gradients(checkpointing):
    tokens, found = given()

    def gradients(model):
        model.train()
        model(tokens, labels=tokens, **found).loss.backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    # a window over the whole text is full attention
    expected = gradients(small_model())
    model = small_model()
    memlm.extend_context(model, window=LENGTH, sinks=0)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # the newer name
        (enable or model.gradient_checkpointing_enable)()
    found_here = gradients(model)
    assert found_here.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found_here[name], gradient, **EXACT)


def test_what_cannot_be_is_refused():
    with pytest.raises(UnsupportedModelError, match="act through distances alone"):
        memlm.extend_context(small_model(learned_positions=True), **SETTINGS)
    model = small_model()
    memlm.extend_context(model, **SETTINGS)
    tokens = made_up(1, 8)[0]
    with pytest.raises(InputError, match="one document per row"):
        model(tokens, document_ids=torch.tensor([[0] * 4 + [1] * 4]))
    dropped = small_model(attention_dropout=0.1).train()
    memlm.extend_context(dropped, **SETTINGS)
    with pytest.raises(UnsupportedModelError, match="has no dropout"):
        dropped(tokens)
