"""Prompts in chunks: the same logits and tokens, and never more than a chunk in the body."""

import pytest
import torch
from torch.testing import assert_close

from memlm.core.merges import Mixture
from memlm.memory.local import LocalMemory
from memlm.models.attach import attach
from memlm.models.extend import extend_context, extended, restore_context
from memlm.models.extension import attention_layers
from memlm.testing.tiny import tiny_model, tiny_tokens

SETTINGS = {"window": 16, "sinks": 3}
GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "use_cache": True}
TOLERANCE = {"rtol": 1e-4, "atol": 3e-4}


class Widths:
    """How many tokens every pass of a body reads."""

    def __init__(self, model):
        self.seen = []
        first = attention_layers(model.get_decoder())[0]
        first.register_forward_hook(self.look)

    def look(self, module, args, output):
        self.seen.append(output[0].shape[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "bloom", "falcon", "gpt_neox"])
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generate_reads_its_prompt_in_chunks(family, extra):
    rows = 1 if "prompt_lookup_num_tokens" in extra else 2
    tokens, mask = tiny_tokens(rows, 150), torch.ones(rows, 150, dtype=torch.long)
    mask[-1, : 70 * (rows - 1)] = 0
    model, settings = tiny_model(family), {**GREEDY, **extra, "attention_mask": mask}
    with extended(model, **SETTINGS):
        expected = model.generate(tokens * mask, **settings)
    extend_context(model, **SETTINGS, chunk=20)
    widths = Widths(model)
    assert torch.equal(model.generate(tokens * mask, **settings), expected)
    # tokens that are only proposed are read along with the prompt
    assert widths.seen[0] == (14 if rows == 1 else 10)
    assert widths.seen[1:8] == [20] * 7
    assert max(widths.seen[8:]) < 20


def test_a_pass_that_keeps_the_last_logits():
    tokens, model = tiny_tokens(2, 70), extend_context(tiny_model("llama"), **SETTINGS, chunk=16)
    widths = Widths(model)
    with torch.no_grad():
        whole = model(tokens).logits
        assert widths.seen == [70]
        output = model(input_ids=tokens, logits_to_keep=3, use_cache=True)
        assert widths.seen[1:] == [6, 16, 16, 16, 16]
        assert_close(output.logits, whole[:, -3:], **TOLERANCE)
        assert output.past_key_values.get_seq_length() == 70
        embedded = model.get_input_embeddings()(tokens)
        again = model(inputs_embeds=embedded, logits_to_keep=3, use_cache=True)
        assert_close(again.logits, output.logits)
        more = tiny_tokens(2, 40, seed=1)
        rows = model(input_ids=more, past_key_values=again.past_key_values, logits_to_keep=1)
        expected = model(torch.cat([tokens, more], dim=1)).logits[:, -1:]
    assert_close(rows.logits, expected, **TOLERANCE)


def test_what_needs_every_token_reads_at_once():
    tokens, model = tiny_tokens(1, 70), extend_context(tiny_model("llama"), **SETTINGS, chunk=16)
    widths = Widths(model)
    with torch.no_grad():
        model(tokens)
        model(input_ids=tokens, labels=tokens, use_cache=False)
        model(input_ids=tokens, logits_to_keep=17)
        model(input_ids=tokens, logits_to_keep=1, use_cache=False)
        states = model(input_ids=tokens, logits_to_keep=1, output_hidden_states=True).hidden_states
    model(input_ids=tokens, logits_to_keep=1).logits.sum().backward()
    assert states[-1].shape[1] == 70
    assert widths.seen == [70] * 6
    restore_context(model)
    with torch.no_grad():
        model(input_ids=tokens, logits_to_keep=1)
    assert widths.seen == [70] * 7


def test_settings_that_look_at_a_whole_pass_read_at_once():
    tokens, model = tiny_tokens(1, 70), tiny_model("llama")
    widths = Widths(model)
    with torch.no_grad(), extended(model, **SETTINGS, chunk=16, clamp="original"):
        model(input_ids=tokens, logits_to_keep=1)
    assert widths.seen[-1] == 70


def test_a_memory_sees_the_whole_prompt():
    prompt, written = tiny_tokens(1, 70), []
    for chunk in (16, 1000):
        model = extend_context(tiny_model("llama"), **SETTINGS, chunk=chunk)
        lm = attach(model, LocalMemory(size=64), Mixture(0.5))
        written.append(lm.generate(prompt, **GREEDY))
    assert torch.equal(*written)
