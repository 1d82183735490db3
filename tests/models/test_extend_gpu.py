"""Extended models on a CUDA device."""

import copy

import pytest
import torch
from torch.testing import assert_close

from memlm.models.extend import extend_context, extended
from memlm.testing.tiny import tiny_model, tiny_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
SETTINGS = {"window": 64, "sinks": 4}


def wide_llama():
    """Heads that every kernel takes."""
    return tiny_model("llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=32, max_position_embeddings=4096)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_are_those_of_the_cpu(dtype):
    model, tokens = extend_context(wide_llama(), **SETTINGS), tiny_tokens(2, 3000)
    mask = torch.ones_like(tokens)
    mask[1, :1700] = 0
    with torch.inference_mode():
        expected = model(tokens * mask, attention_mask=mask).logits
        model = model.to("cuda", dtype)
        got = model((tokens * mask).cuda(), attention_mask=mask.cuda()).logits.cpu().float()
    real = mask.bool()
    if dtype == torch.float32:
        assert_close(got[real], expected[real], rtol=1e-3, atol=2e-3)
    else:
        off = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert off[real].median() < 0.05


def test_generation_is_that_of_the_cpu():
    model, tokens = extend_context(wide_llama(), **SETTINGS, chunk=500), tiny_tokens(2, 1300)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    expected = model.generate(tokens, **settings)
    assert torch.equal(model.cuda().generate(tokens.cuda(), **settings).cpu(), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step(mode):
    """Fixed shapes, nothing read back."""
    torch._dynamo.reset()
    model, tokens = extend_context(wide_llama().cuda(), **SETTINGS), tiny_tokens(2, 400).cuda()
    with torch.no_grad():
        cache = model(tokens[:, :300], use_cache=True).past_key_values
        twin = copy.deepcopy(cache)

        def step(token, past):
            return model(token, past_key_values=past, use_cache=True).logits

        compiled = torch.compile(step, fullgraph=True, mode=mode)
        for at in range(300, 400):
            token = tokens[:, at : at + 1]
            assert_close(compiled(token, cache).clone(), step(token, twin), rtol=1e-3, atol=2e-3)
    assert cache.get_seq_length() == 400


def test_memory_of_a_prompt_is_flat():
    """A prompt in chunks needs no more than one chunk, whatever its length."""
    model, peaks = wide_llama().cuda(), []
    with extended(model, **SETTINGS, chunk=1024):
        for length in (8192, 65_536):
            torch.cuda.reset_peak_memory_stats()
            model.generate(tiny_tokens(1, length).cuda(), max_new_tokens=2, do_sample=False)
            peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]
