"""The cache of extended models: constant, exact at any position, cropped, saved, shared by rows."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.models.extend import extend_context, restore_context
from memlm.models.window_cache import SPARE, WindowLayer
from memlm.models.window_file import load_window, save_window
from memlm.ops.lambda_rule import Keys, LambdaConfig
from memlm.testing.tiny import tiny_model, tiny_tokens

WINDOW, SINKS = 16, 3
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


@pytest.fixture
def llama():
    return extend_context(tiny_model("llama"), window=WINDOW, sinks=SINKS)


def run(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, use_cache=True, **inputs)


def places(cache):
    return [layer.positions.clone() for layer in cache.layers]


def turn(x, positions):
    half = x.shape[-1] // 2
    frequencies = 100.0 ** -(torch.arange(half) / half)
    angles = positions[:, None, :, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(),
                      first * angles.sin() + second * angles.cos()], dim=-1)  # fmt: skip


def test_memory_is_allocated_once_and_never_moves(llama):
    output = run(llama, tiny_tokens(2, 10))
    cache = output.past_key_values
    where = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for size in (1, 1, 40, 1, 200, 1):
        run(llama, tiny_tokens(2, size), past_key_values=cache)
        for layer, begun in zip(cache.layers, where, strict=True):
            assert (layer.keys.data_ptr(), layer.values.data_ptr()) == begun
            assert layer.keys.shape[2] == SINKS + WINDOW + SPARE + 1


@pytest.mark.parametrize("clamp", ["causal", "streaming"])
def test_two_hundred_million_tokens_are_as_ten_thousand(clamp):
    """The same contents at another position: bit for bit, token by token and in pieces."""
    config = LambdaConfig(WINDOW, SINKS, None if clamp == "streaming" else 8, clamp)
    slots = WINDOW + SPARE
    outputs = []
    for start in (125 * slots, 2_500_000 * slots):
        draw = torch.Generator().manual_seed(0)

        def new(count, at, draw=draw):
            shape = (1, 2, count, 8)
            parts = [torch.randn(shape, generator=draw) for _ in range(3)]
            return parts[0], Keys(*parts[1:], at + torch.arange(count)[None])

        layer = WindowLayer(config)
        rows = []
        for count, at in ((SINKS, 0), (100, start), (1, start + 100), (1, start + 101),
                          (30, start + 102), (1, start + 132)):  # fmt: skip
            query, keys = new(count, at)
            layer.update(keys.key, keys.value)
            rows.append(layer.attend(query, keys, rotate=turn))
        outputs.append(torch.cat(rows[1:], dim=2))
    assert start > 1.9e8
    assert torch.equal(*outputs)


@pytest.mark.parametrize("length", [5, 40, 300])
@pytest.mark.parametrize("count", [1, 9, SPARE])
def test_what_was_taken_back_never_happened(llama, length, count):
    tokens = tiny_tokens(2, length)
    cache = run(llama, tokens).past_key_values
    before = places(cache)
    for piece in tiny_tokens(2, count, seed=1).split(7, dim=1):
        run(llama, piece, past_key_values=cache)
    cache.crop(-count)
    assert cache.get_seq_length() == length
    following = tiny_tokens(2, 30, seed=2)
    pieces = following.split([1, 9, 20], dim=1)
    rows = [run(llama, piece, past_key_values=cache).logits for piece in pieces]
    expected = run(llama, torch.cat([tokens, following], dim=1)).logits[:, length:]
    assert_close(torch.cat(rows, dim=1), expected, **TOLERANCE)
    if length + count <= SPARE + WINDOW:
        cache.crop(-30)
        assert all(map(torch.equal, places(cache), before))


def test_prompt_lookup_and_an_assistant_write_the_same(llama):
    prompt = tiny_tokens(1, 30).repeat(1, 2)
    settings = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    expected = llama.generate(prompt, **settings)
    assert torch.equal(llama.generate(prompt, prompt_lookup_num_tokens=5, **settings), expected)
    assistant = tiny_model("llama", num_hidden_layers=1)
    written = llama.generate(prompt, assistant_model=assistant, **settings)
    assert torch.equal(written, expected)


def test_a_long_prompt_may_be_read_in_chunks_by_generate(llama):
    prompt = tiny_tokens(2, 150)
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = llama.generate(prompt, **settings)
    assert torch.equal(llama.generate(prompt, prefill_chunk_size=32, **settings), expected)


def test_generation_goes_on_from_a_cache(llama):
    prompt = tiny_tokens(1, 50)
    settings = {"min_new_tokens": 10, "max_new_tokens": 10, "do_sample": False}
    whole = llama.generate(prompt, **{**settings, "max_new_tokens": 20, "min_new_tokens": 20})
    half = llama.generate(prompt, return_dict_in_generate=True, **settings)
    rest = llama.generate(half.sequences, past_key_values=half.past_key_values, **settings)
    assert torch.equal(rest, whole)


def test_a_cache_made_without_gradients_goes_on_anywhere(llama):
    tokens = tiny_tokens(2, 40)
    whole = run(llama, tokens).logits
    cache = run(llama, tokens[:, :30]).past_key_values
    with torch.no_grad():
        row = llama(tokens[:, 30:31], past_key_values=cache).logits
    assert_close(row, whole[:, 30:31], **TOLERANCE)
    rows = llama(tokens[:, 31:], past_key_values=cache).logits
    assert_close(rows, whole[:, 31:], **TOLERANCE)
    rows.sum().backward()


@pytest.mark.parametrize("length", [2, 40, 200])
def test_it_comes_back_from_disk(llama, length, tmp_path):
    tokens = tiny_tokens(2, length + 30)
    cache = run(llama, tokens[:, :length]).past_key_values
    path = tmp_path / "cache.safetensors"
    save_window(cache, path, llama, tensors={"mine": torch.ones(2)}, notes={"page": 7})
    again, tensors, notes = load_window(path, llama)
    assert notes == {"page": 7}
    assert torch.equal(tensors["mine"], torch.ones(2))
    for piece in tokens[:, length:].split([1, 9, 20], dim=1):
        rows = [run(llama, piece, past_key_values=kept).logits for kept in (cache, again)]
        assert torch.equal(*rows)
    assert not list(tmp_path.glob("*.tmp"))


def test_wrong_files_and_caches_are_refused(llama, tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = run(llama, tiny_tokens(1, 20)).past_key_values
    save_window(cache, path, llama)
    with pytest.raises(FingerprintError, match="made by another model"):
        load_window(path, tiny_model("llama", seed=1))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptStoreError, match="must be a cache that save_window wrote"):
        load_window(path, llama)
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        load_window(tmp_path / "none", llama)
    with pytest.raises(InputError, match="cache of an extended model"):
        save_window(DynamicCache(), path, llama)
    with pytest.raises(InputError, match="minus the number of tokens"):
        cache.layers[0].crop(3)
    run(llama, tiny_tokens(1, 200), past_key_values=cache)
    with pytest.raises(InputError, match="can take back up to 65 tokens, got 66"):
        cache.layers[0].crop(-66)
    restore_context(llama)
