"""The head alone gives the model's own logits, and known targets without vocabulary rows."""

import pytest
import torch
from torch import nn

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.head import find_head
from memlm.models.taps import find_tap, forward_to_tap
from memlm.testing.tiny import FAMILIES, VOCABULARY, tiny_model, tiny_tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_equal_the_models_bit_for_bit(family):
    model, tokens = tiny_model(family), tiny_tokens(2, 8)
    head = find_head(model)
    with torch.no_grad():
        hidden = forward_to_tap(model, find_tap(model, "final"), tokens)
        assert torch.equal(head.logits(hidden), model(tokens).logits)
    assert head.vocab_size == VOCABULARY


def test_soft_cap_factor_and_divisor_are_read():
    assert find_head(tiny_model("gemma2")).cap == 3.0
    assert find_head(tiny_model("cohere")).scale == 0.25
    assert find_head(tiny_model("granite")).divisor == 4.0


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
def test_targets_agree_with_the_log_softmax(family, chunk):
    model = tiny_model(family)
    hidden, targets = torch.randn(17, 16), tiny_tokens(1, 17)[0]
    partial = find_head(model).target(hidden, targets, chunk)
    expected = find_head(model).logits(hidden).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(partial.target_lse - partial.lse, expected)


def test_half_precision_is_accumulated_in_float32():
    model = tiny_model("llama").to(torch.bfloat16)
    hidden, targets = torch.randn(6, 16, dtype=torch.bfloat16), tiny_tokens(1, 6)[0]
    partial = find_head(model).target(hidden, targets)
    assert partial.lse.dtype == torch.float32
    logits = find_head(model).logits(hidden)
    torch.testing.assert_close(partial.lse, logits.float().logsumexp(-1))


def test_no_rows_give_no_scores():
    partial = find_head(tiny_model("llama")).target(torch.zeros(0, 16), torch.zeros(0).long())
    assert partial.lse.shape == partial.target_lse.shape == (0,)


def test_gradients_reach_the_hidden_states():
    hidden = torch.randn(5, 16, requires_grad=True)
    partial = find_head(tiny_model("llama")).target(hidden, tiny_tokens(1, 5)[0], chunk=2)
    (partial.lse - partial.target_lse).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().min() > 0


def test_targets_outside_the_vocabulary_are_named():
    head = find_head(tiny_model("llama"))
    with pytest.raises(InputError, match=f"0 to {VOCABULARY - 1}.*got 4 to 99"):
        head.target(torch.zeros(2, 16), torch.tensor([4, 99]))
    with pytest.raises(InputError, match="-100"):
        head.target(torch.zeros(2, 16), torch.tensor([4, -100]))
    with pytest.raises(InputError, match=r"\(2, 16\) and \(3,\)"):
        head.target(torch.zeros(2, 16), torch.tensor([4, 5, 6]))


def test_a_head_that_does_something_else_is_refused():
    model = tiny_model("llama")
    model.register_forward_hook(_shift)
    with pytest.raises(UnsupportedModelError, match="a probe differed"):
        find_head(model)


def _shift(module, args, output):
    output.logits = output.logits + 0.01
    return output


def test_a_model_without_head_is_refused():
    model = tiny_model("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedModelError, match="language-model head"):
        find_head(model)


def test_the_probe_does_not_depend_on_dropout():
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    assert isinstance(find_head(model).projection, nn.Linear)
    assert model.training
