"""Middle tokens in extended models: a float64 oracle in every family, and the laws of the rule."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from memlm.core.errors import InputError
from memlm.models.extend import extend_context, extended
from memlm.models.extend_families import FAMILIES
from memlm.models.extension import Extension
from memlm.models.middle_cache import MiddleLayer
from memlm.models.window_cache import SPARE
from memlm.models.window_file import load_window, save_window
from memlm.ops.middle_rule import MiddleConfig
from memlm.testing import tiny

from .lambda_oracle import install

WINDOW, SINKS, LENGTH, VOCABULARY = 10, 3, 60, 400
SETTINGS = {"window": WINDOW, "sinks": SINKS}
TOLERANCE = {"rtol": 1e-4, "atol": 5e-4}
QUIRKS = ["llama", "gptj", "bloom", "falcon", "gemma2", "cohere2", "smollm3"]
KINDS = [
    MiddleConfig(k=8, block=4, first_layer=0),
    MiddleConfig(k=3, block=1, first_layer=0, distance=7),
    MiddleConfig(k=8, block=4, first_layer=0, capacity=14, offload=True),
    MiddleConfig(k=2, block=1, first_layer=1, capacity=9),
]


def tiny_model(family, **settings):
    return tiny.tiny_model(family, **{"vocab_size": VOCABULARY, **settings})


def tiny_tokens(rows, length, seed=0):
    """No token twice in a row: blocks of equal keys would tie, and either may be taken."""
    draw = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(VOCABULARY - 3, generator=draw)[:length] for _ in range(rows)]
    return 3 + torch.stack(drawn)


def name(middle):
    return f"k{middle.k}-block{middle.block}-capacity{middle.capacity}"


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


def in_pieces(model, tokens, pieces):
    cache, rows = DynamicCache(config=model.config), []
    for piece in tokens.split(pieces, dim=1):
        rows.append(logits(model, piece, past_key_values=cache))
    return torch.cat(rows, dim=1), cache


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_definition(family, monkeypatch):
    """Few of the middle tokens, and all of them: attention to everything at limited distances."""
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    kinds = [*KINDS, MiddleConfig(k=LENGTH, block=1, first_layer=0)]
    outputs = []
    for middle in kinds:
        with extended(model, **SETTINGS, middle=middle):
            outputs.append(logits(model, tokens, use_cache=False))
    extend_context(model, **SETTINGS)
    plain = logits(model, tokens, use_cache=False)
    for middle, output in zip(kinds, outputs, strict=True):
        install(monkeypatch, Extension, **SETTINGS, limit=WINDOW, middle=middle)
        assert_close(output, logits(model, tokens, use_cache=False), **TOLERANCE)
        assert torch.equal(output[:, : WINDOW + SINKS], plain[:, : WINDOW + SINKS])
        assert (output - plain)[:, WINDOW + SINKS :].abs().max() > 1e-3


@pytest.mark.parametrize("middle", KINDS, ids=name)
@pytest.mark.parametrize("family", QUIRKS)
def test_pieces_and_single_tokens_are_one_long_forward(family, middle):
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    extend_context(model, **SETTINGS, middle=middle)
    whole = logits(model, tokens, use_cache=False)
    for pieces in ([LENGTH], [1, 22, 7, 30], [3] + [1] * (LENGTH - 3)):
        rows, cache = in_pieces(model, tokens, pieces)
        assert_close(rows, whole, **TOLERANCE)
        assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("middle", [KINDS[0], KINDS[3]], ids=name)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_padding_is_not_seen(family, side, middle):
    model, lengths, width = tiny_model(family), (50, 2, 31), 50
    tokens, mask = tiny_tokens(3, width), torch.zeros(3, width, dtype=torch.long)
    rows = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for row, part in enumerate(rows):
        mask[row, part] = 1
    extend_context(model, **SETTINGS, middle=middle)
    together = logits(model, tokens * mask, attention_mask=mask)
    assert together.isfinite().all()
    for row, part in enumerate(rows):
        alone = logits(model, tokens[row : row + 1, part])
        assert_close(together[row : row + 1, part], alone, **TOLERANCE)


def test_turns_with_padding_between_them(llama):
    first, second = tiny_tokens(2, 40), tiny_tokens(2, 30, seed=1)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, 17:40] = 0
    extend_context(llama, **SETTINGS, middle=KINDS[0])
    cache = DynamicCache(config=llama.config)
    logits(llama, first, attention_mask=mask[:, :40], past_key_values=cache)
    rows = [logits(llama, second[:, :29], attention_mask=mask[:, :69], past_key_values=cache),
            logits(llama, second[:, 29:], attention_mask=mask, past_key_values=cache)]  # fmt: skip
    alone = torch.cat([first[1:, :17], second[1:]], dim=1)
    expected = logits(llama, alone)[:, 17:]
    assert_close(torch.cat(rows, dim=1)[1:], expected, **TOLERANCE)


@pytest.mark.parametrize("middle", [KINDS[0], KINDS[3]], ids=name)
def test_a_padded_batch_is_generated_with_beams_as_its_rows_are(llama, middle):
    lengths, new = (40, 5), 20
    tokens, mask = tiny_tokens(2, lengths[0]), torch.zeros(2, lengths[0], dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    extend_context(llama, **SETTINGS, middle=middle)
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 2}
    together = llama.generate(tokens * mask, attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        alone = llama.generate(tokens[row : row + 1, -length:], **settings)
        assert torch.equal(together[row, -new:], alone[0, -new:])


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
def test_none_is_plain_lambda_attention_bit_for_bit(family):
    model, tokens = tiny_model(family), tiny_tokens(2, LENGTH)
    rows = []
    for settings in ({}, {"middle": MiddleConfig(k=0)}):
        with extended(model, **SETTINGS, **settings):
            rows.append([logits(model, tokens), in_pieces(model, tokens, [30] + [1] * 30)[0]])
    assert all(map(torch.equal, *rows))


def test_all_of_them_are_the_kept_middle(llama):
    """Forward and gradients, at the same limit: two ways to compute one thing."""
    tokens, found = tiny_tokens(2, 40), []
    every = MiddleConfig(k=40, block=4, first_layer=0, distance=WINDOW)
    for middle in (every, "kept"):
        llama.zero_grad()
        with extended(llama, **SETTINGS, middle=middle):
            output = llama(tokens, labels=tokens, use_cache=False)
            output.loss.backward()
        gradients = [weight.grad.clone() for weight in llama.parameters()]
        found.append([output.logits.detach(), *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("middle", [KINDS[0], KINDS[2]], ids=name)
def test_gradients_pass_through_a_cache(llama, middle):
    tokens, gradients = tiny_tokens(2, 40), []
    extend_context(llama, **SETTINGS, middle=middle)
    for use_cache in (False, True):
        llama.zero_grad()
        llama(tokens, labels=tokens, use_cache=use_cache).loss.backward()
        gradients.append([weight.grad.clone() for weight in llama.parameters()])
    for cached, plain in zip(*gradients, strict=True):
        assert_close(cached, plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("middle", KINDS, ids=name)
def test_later_tokens_change_nothing_before(llama, middle):
    tokens = tiny_tokens(1, LENGTH)
    extend_context(llama, **SETTINGS, middle=middle)
    rows = logits(llama, tokens)
    for at in (5, 30, LENGTH - 1):
        other = tokens.clone()
        other[0, at:] = 3 + (tokens[0, at:] - 2) % 397
        changed = logits(llama, other)
        assert_close(changed[:, :at], rows[:, :at], rtol=0, atol=1e-5)
        assert (changed - rows)[:, at].abs().max() > 1e-2


def test_what_the_window_has_left_is_found_again():
    model = tiny_model("llama", num_hidden_layers=1)
    tokens = tiny_tokens(1, LENGTH)
    other = tokens.clone()
    other[0, 12] = 3 + (tokens[0, 12] - 2) % 397
    for capacity, again in ((None, True), (12, False)):
        middle = MiddleConfig(k=12, block=4, first_layer=0, capacity=capacity)
        with extended(model, **SETTINGS, middle=middle):
            rows = [logits(model, each)[0, 40:] for each in (tokens, other)]
        assert bool((rows[0] != rows[1]).any()) is again


def test_token_by_token_the_last_query_is_every_query(llama):
    """With k = 1 there are never too few; of a forward pass of many tokens only the last looks."""
    tokens, rows = tiny_tokens(2, LENGTH), {}
    for rule in ("every", "last"):
        middle = MiddleConfig(k=1, block=1, first_layer=0, rule=rule)
        with extended(llama, **SETTINGS, middle=middle):
            rows[rule] = in_pieces(llama, tokens, [1] * LENGTH)[0]
            at_once = logits(llama, tokens)
    assert_close(rows["last"], rows["every"], **TOLERANCE)
    with extended(llama, **SETTINGS):
        plain = logits(llama, tokens)
    assert torch.equal(at_once[:, :-1], plain[:, :-1])
    assert (at_once - plain)[:, -1].abs().max() > 1e-3


def test_the_last_query_of_padded_rows_is_their_own(llama):
    lengths, width = (50, 31, 4), 50
    tokens, mask = tiny_tokens(3, width), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    extend_context(llama, **SETTINGS, middle=MiddleConfig(k=3, block=1, first_layer=0, rule="last"))
    together = logits(llama, tokens * mask, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = logits(llama, tokens[row : row + 1, :length])
        assert_close(together[row : row + 1, :length], alone, **TOLERANCE)


@pytest.mark.parametrize("middle", [KINDS[0], KINDS[2]], ids=name)
@pytest.mark.parametrize("count", [1, 9, SPARE])
def test_what_was_taken_back_never_happened(llama, count, middle):
    extend_context(llama, **SETTINGS, middle=middle)
    tokens, following = tiny_tokens(2, 150), tiny_tokens(2, 30, seed=2)
    _, cache = in_pieces(llama, tokens, [150])
    for piece in tiny_tokens(2, count, seed=1).split(7, dim=1):
        logits(llama, piece, past_key_values=cache)
    cache.crop(-count)
    rows = [logits(llama, x, past_key_values=cache) for x in following.split([1, 9, 20], dim=1)]
    expected = logits(llama, torch.cat([tokens, following], dim=1))[:, 150:]
    assert_close(torch.cat(rows, dim=1), expected, **TOLERANCE)


def test_prompt_lookup_writes_the_same(llama):
    extend_context(llama, **SETTINGS, middle=KINDS[0])
    prompt = tiny_tokens(1, 30).repeat(1, 2)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = llama.generate(prompt, **settings)
    assert torch.equal(llama.generate(prompt, prompt_lookup_num_tokens=5, **settings), expected)


def test_a_ring_stays_where_it_is_and_a_growing_store_doubles(llama):
    sizes = {}
    for capacity in (20, None):
        middle = MiddleConfig(k=8, block=4, first_layer=0, capacity=capacity)
        with extended(llama, **SETTINGS, middle=middle):
            _, cache = in_pieces(llama, tiny_tokens(1, 40), [40])
            found = []
            for seed in range(6):
                logits(llama, tiny_tokens(1, 100, seed=seed), past_key_values=cache)
                logits(llama, tiny_tokens(1, 1, seed=seed), past_key_values=cache)
                assert all(isinstance(layer, MiddleLayer) for layer in cache.layers)
                found.append([(x.store.key.data_ptr(), x.store.key.shape) for x in cache.layers])
        sizes[capacity] = [[shape[2] for _, shape in row] for row in found]
        assert capacity is None or all(row == found[0] for row in found)
    assert sizes[20][-1] == [(20 + WINDOW + 64 + SPARE + 1) // 4 + 3] * 2
    assert 646 // 4 <= sizes[None][-1][0] <= 2 * 646 // 4 + 2


@pytest.mark.parametrize("middle", [KINDS[0], KINDS[2]], ids=name)
def test_it_comes_back_from_disk(llama, middle, tmp_path):
    extend_context(llama, **SETTINGS, middle=middle)
    tokens, following = tiny_tokens(1, 90), tiny_tokens(1, 20, seed=1)
    _, cache = in_pieces(llama, tokens, [90])
    save_window(cache, tmp_path / "kept.safetensors", llama)
    loaded, tensors, notes = load_window(tmp_path / "kept.safetensors", llama)
    assert not tensors
    assert not notes
    for one, other in zip(cache.layers, loaded.layers, strict=True):
        assert other.middle == middle
        for part, same in zip(one.store.held().values(), other.store.held().values(), strict=True):
            assert torch.equal(part, same)
    rows = [logits(llama, following, past_key_values=each) for each in (cache, loaded)]
    assert torch.equal(*rows)


def test_bfloat16(llama):
    tokens = tiny_tokens(2, LENGTH)
    model = extend_context(llama.to(torch.bfloat16), **SETTINGS, middle=KINDS[0])
    whole = logits(model, tokens, use_cache=False)
    rows, cache = in_pieces(model, tokens, 20)
    assert rows.dtype == cache.layers[0].store.key.dtype == torch.bfloat16
    off = (rows - whole).float().norm(dim=-1) / whole.float().norm(dim=-1)
    assert off.median() < 0.1


@pytest.mark.parametrize(
    ("middle", "words"),
    [
        (MiddleConfig(k=32, block=16, first_layer=0), "must not exceed the window of 10, got 16"),
        (MiddleConfig(k=8, block=8), "in some of the 2 layers"),
        ("some", "middle must be 'dropped', a MiddleConfig, or 'kept'"),
    ],
)
def test_what_cannot_be_is_refused(llama, middle, words):
    with pytest.raises(InputError, match=words):
        extend_context(llama, **SETTINGS, middle=middle)


def test_a_model_that_slides_in_all_these_layers_is_refused():
    model = tiny_model("gemma2")  # the first layer slides
    with pytest.raises(InputError, match="slide"):
        extend_context(model, **SETTINGS, middle=MiddleConfig(8, 8, first_layer=0, end_layer=1))


def test_a_cache_of_other_middle_tokens_is_refused(llama):
    with extended(llama, **SETTINGS, middle=KINDS[0]):
        _, cache = in_pieces(llama, tiny_tokens(1, 20), [20])
    with extended(llama, **SETTINGS), pytest.raises(InputError, match="start with a new cache"):
        logits(llama, tiny_tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": -1}, "k must not be negative"),
        ({"k": 8, "block": 0}, "block must be at least 1"),
        ({"k": 5, "block": 4}, "k must be a multiple of the 4 tokens of a block, got 5"),
        ({"k": 16, "distance": -1}, "distance must be None or not negative"),
        ({"k": 16, "first_layer": 4, "end_layer": 4}, "there must be a layer from"),
        ({"k": 16, "rule": "first"}, "rule must be 'every' or 'last'"),
        ({"k": 16, "capacity": 8}, "capacity must be None, or at least 1 and k"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(InputError, match=words):
        MiddleConfig(**settings)


def test_settings_come_back():
    assert all(MiddleConfig.from_dict(each.to_dict()) == each for each in KINDS)
    assert "8 middle tokens of the 14 behind the window in blocks of 4" in KINDS[2].describe()


@pytest.mark.gpu
def test_an_offloaded_store_leaves_the_device_as_it_is():
    tokens = [tiny_tokens(1, 300, seed=seed) for seed in range(5)]
    middle = MiddleConfig(k=8, block=4, first_layer=0, offload=True)
    rows, held = {}, []
    for device in ("cpu", "cuda"):
        model = extend_context(tiny_model("llama").to(device), **SETTINGS, middle=middle)
        cache, rows[device] = DynamicCache(config=model.config), []
        for piece in tokens:
            output = logits(model, piece.to(device), past_key_values=cache)
            rows[device].append(output.cpu())
            del output
            held.append(torch.cuda.memory_allocated())
        assert all(layer.store.key.device.type == "cpu" for layer in cache.layers)
        assert all(layer.keys.device.type == device for layer in cache.layers)
    # 300 tokens more in the store are 38 kB
    assert held[-1] - held[-4] < 10_000
    off = torch.cat(rows["cuda"]) - torch.cat(rows["cpu"])
    assert off.norm() < 0.01 * torch.cat(rows["cpu"]).norm()
