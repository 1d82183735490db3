"""The memory's state follows everything that is done to the cache it rides on."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache, StaticCache

from memlm.core.errors import UnsupportedModelError
from memlm.memory.local import LocalMemory
from memlm.models.attach import attach
from memlm.models.cache import MemoryCache
from memlm.testing.tiny import tiny_model, tiny_tokens

from .memories import Counter


@pytest.fixture(params=[Counter, LocalMemory])
def read(request):
    """A model, five tokens of two rows, and the cache after them."""
    lm, tokens = attach(tiny_model(), request.param()), tiny_tokens(2, 5)
    with torch.no_grad():
        return lm, tokens, lm(tokens).past_key_values


def follow(lm, cache, token):
    with torch.no_grad():
        return lm(token, past_key_values=cache).logits


def alone(lm, tokens):
    with torch.no_grad():
        return lm(tokens).logits[:, -1:]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


NEXT = torch.tensor([[7], [9]])


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0, 0]])
@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
def test_rows_are_exchanged_and_copied(read, method, index):
    lm, tokens, cache = read
    getattr(cache, method)(torch.tensor(index))
    close(follow(lm, cache, NEXT), alone(lm, torch.cat([tokens[index], NEXT], 1)))


def test_rows_are_dropped(read):
    lm, tokens, cache = read
    cache.batch_select_indices(torch.tensor([1]))
    close(follow(lm, cache, NEXT[:1]), alone(lm, torch.cat([tokens[1:], NEXT[:1]], 1)))


def test_rows_are_repeated(read):
    lm, tokens, cache = read
    cache.batch_repeat_interleave(2)
    four = torch.tensor([[7], [9], [11], [13]])
    rows = tokens.repeat_interleave(2, dim=0)
    close(follow(lm, cache, four), alone(lm, torch.cat([rows, four], 1)))
    assert cache.rows == 4


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_positions_are_taken_back(read, gone):
    lm, tokens, cache = read
    cache.crop(-gone)
    close(follow(lm, cache, NEXT), alone(lm, torch.cat([tokens[:, : 5 - gone], NEXT], 1)))


def test_copies_are_independent_but_share_the_memory(read):
    lm, _, cache = read
    twin = copy.deepcopy(cache)
    assert twin.memory is cache.memory
    before = follow(lm, twin, NEXT)
    close(follow(lm, cache, NEXT), before)
    assert cache.get_seq_length() == twin.get_seq_length() == 6


def test_a_reset_static_cache_starts_anew():
    lm, tokens = attach(tiny_model(), Counter()), tiny_tokens(2, 5)
    static = StaticCache(lm.config.get_text_config(), max_cache_len=16)
    with torch.no_grad():
        cache = lm(tokens, past_key_values=static).past_key_values
        first = lm.memory.stats(cache.state)
        cache.reset()
        again = lm(tokens, past_key_values=cache).past_key_values
    assert cache.stats() == first == {"seen": [5, 5]}
    assert again is cache


def test_the_layers_are_shared_not_copied():
    inner = DynamicCache()
    cache = MemoryCache(inner, Counter(), Counter().init_state(1), 1)
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    assert inner.get_seq_length() == cache.get_seq_length() == 3
    assert cache.layers is inner.layers


def test_an_encoder_decoder_cache_is_refused():
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        MemoryCache(both, Counter(), None, 1)
