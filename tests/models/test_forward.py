"""The forward pass of a model with memory: merging, padding, caches, losses, gradients."""

import pytest
import torch
from transformers import DynamicCache

from memlm.core.errors import InputError
from memlm.core.merges import Mixture, Union
from memlm.memory.local import LocalMemory
from memlm.models import rows
from memlm.models.attach import attach
from memlm.models.cache import MemoryCache
from memlm.models.taps import find_tap, forward_to_tap
from memlm.ops.merge import merge_logits
from memlm.testing.tiny import FAMILIES, tiny_model, tiny_tokens

from .memories import Counter, Fixed

MERGES = [Mixture(0.4), Union()]


def right_padded(tokens, lengths):
    mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()
    return tokens * mask, mask


def left_padded(tokens, lengths):
    """Row i is the first ``lengths[i]`` tokens of ``tokens[i]``, moved to the right end."""
    width = tokens.shape[1]
    padded, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = tokens[row, :length]
        mask[row, width - length :] = 1
    return padded, mask


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "opt", "bloom"])
@pytest.mark.parametrize("merge", MERGES, ids=["mixture", "union"])
def test_logits_are_the_models_merged_with_the_candidates(family, merge):
    model, memory, tokens = tiny_model(family), Fixed(share=0.7), tiny_tokens(3, 8)
    with torch.no_grad():
        got = attach(model, memory, merge)(tokens).logits
        queries = forward_to_tap(model, find_tap(model), tokens).flatten(0, 1)
        candidates, _ = memory.read(queries, None)
        expected = merge_logits(merge, model(tokens).logits.flatten(0, 1), candidates)
    torch.testing.assert_close(got.flatten(0, 1), expected)
    if isinstance(merge, Mixture):
        spoke = candidates.valid.any(1)
        torch.testing.assert_close(expected[spoke].exp().sum(-1), torch.ones(int(spoke.sum())))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("case", ["lam=0", "empty"])
def test_an_idle_memory_leaves_the_logits_bit_for_bit(family, case):
    model, tokens = tiny_model(family), tiny_tokens(2, 7)
    memory = Fixed(share=0.0 if case == "empty" else 1.0)
    lm = attach(model, memory, Mixture(0.0 if case == "lam=0" else 0.5))
    with torch.no_grad():
        ours, theirs = lm(tokens, labels=tokens), model(tokens, labels=tokens)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.loss, theirs.loss)
    assert memory.queries == (0 if case == "lam=0" else 14)


def test_rows_without_candidates_keep_their_bits():
    model, memory, tokens = tiny_model(), Fixed(share=0.5), tiny_tokens(4, 9)
    with torch.no_grad():
        queries = forward_to_tap(model, find_tap(model), tokens)
        spoke = memory.read(queries.flatten(0, 1), None)[0].valid.any(1).view(4, 9)
        ours, theirs = attach(model, memory)(tokens).logits, model(tokens).logits
    assert 0 < int(spoke.sum()) < 36
    assert torch.equal(ours[~spoke], theirs[~spoke])
    assert not torch.equal(ours[spoke], theirs[spoke])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(
    "memory", [Fixed(), Counter(), LocalMemory(size=4)], ids=["fixed", "counter", "local"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_the_numbers_of_single_rows(family, memory, side):
    lm, tokens, lengths = attach(tiny_model(family), memory), tiny_tokens(3, 9), [9, 4, 6]
    padded, mask = (left_padded if side == "left" else right_padded)(tokens, lengths)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = lm(padded, attention_mask=mask, position_ids=positions)
        for row, length in enumerate(lengths):
            alone = lm(tokens[row : row + 1, :length]).logits[0]
            torch.testing.assert_close(got.logits[row][mask[row].bool()], alone, atol=1e-5, rtol=0)
        base = lm.base(padded, attention_mask=mask, position_ids=positions).logits
    assert torch.equal(got.logits[mask == 0], base[mask == 0])
    if isinstance(memory, Counter):
        assert got.past_key_values.state.seen == tuple(
            tuple(row[:length].tolist()) for row, length in zip(tokens, lengths, strict=True)
        )


def test_padding_is_not_searched():
    memory = Fixed()
    lm = attach(tiny_model(), memory)
    padded, mask = right_padded(tiny_tokens(3, 9), [9, 4, 6])
    with torch.no_grad():
        base = lm.base(padded, attention_mask=mask).logits
        got = lm(padded, attention_mask=mask).logits
    assert memory.queries == 19
    assert torch.equal(got[mask == 0], base[mask == 0])


@pytest.mark.parametrize(
    "memory", [Fixed(), Counter(), LocalMemory(size=4)], ids=["fixed", "counter", "local"]
)
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [8, 1]])
def test_reading_in_pieces_equals_reading_at_once(memory, pieces):
    lm, tokens = attach(tiny_model(), memory), tiny_tokens(2, 9)
    cache, parts = None, []
    with torch.no_grad():
        whole = lm(tokens).logits
        for piece in tokens.split(pieces, dim=1):
            output = lm(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_a_prompt_read_for_its_last_logits_leads_to_the_same_state():
    lm, tokens = attach(tiny_model(), Counter()), tiny_tokens(2, 9)
    with torch.no_grad():
        full = lm(tokens)
        last = lm(tokens, logits_to_keep=1)
    torch.testing.assert_close(last.logits, full.logits[:, -1:])
    assert last.past_key_values.state == full.past_key_values.state


@pytest.mark.parametrize(
    "memory", [Fixed(), Counter(), LocalMemory(size=4)], ids=["fixed", "counter", "local"]
)
@pytest.mark.parametrize("kept", [1, 4, 9, 20, torch.tensor([0, 5, 5, 2])])
@pytest.mark.parametrize("lengths", [[9, 9], [5, 9]])
def test_logits_to_keep_selects_merged_rows(memory, kept, lengths):
    lm = attach(tiny_model(), memory)
    tokens, mask = left_padded(tiny_tokens(2, 9), lengths)
    with torch.no_grad():
        whole = lm(tokens, attention_mask=mask)
        some = lm(tokens, attention_mask=mask, logits_to_keep=kept)
        expected = whole.logits[:, -kept:] if isinstance(kept, int) else whole.logits[:, kept]
        torch.testing.assert_close(some.logits, expected)
        if memory.init_state(1) is not None:  # whatever was asked, what comes next is the same
            after = [
                lm(
                    tokens[:, :2],
                    attention_mask=torch.cat([mask, mask[:, -2:]], 1),
                    past_key_values=output.past_key_values,
                ).logits
                for output in (whole, some)
            ]
            torch.testing.assert_close(*after)


def test_logits_to_keep_may_differ_between_rows_for_a_memory_without_state():
    """Newer transformers select per row; ``keep`` selects the tap's states alike."""
    whole, chosen = torch.randn(2, 9, 4), torch.rand(2, 9) < 0.4
    some = rows.keep(whole, torch.tensor([[1, 2], [7, 0]]))
    assert torch.equal(some, torch.stack([whole[0, [1, 2]], whole[1, [7, 0]]]))
    assert torch.equal(rows.keep(whole, chosen), whole[chosen])
    with pytest.raises(InputError, match=r"1-D tensor, got shape \(2, 9\)"):
        attach(tiny_model(), Counter())(tiny_tokens(2, 9), logits_to_keep=chosen)


def test_chunks_do_not_change_the_rows(monkeypatch):
    lm, tokens = attach(tiny_model(), Fixed(share=0.5)), tiny_tokens(2, 9)
    with torch.no_grad():
        whole = lm(tokens).logits
        monkeypatch.setattr(rows, "_CHUNK_ENTRIES", 1)
        torch.testing.assert_close(lm(tokens).logits, whole)


def test_half_precision_is_merged_in_float32():
    model, tokens = tiny_model().to(torch.bfloat16), tiny_tokens(2, 5)
    with torch.no_grad():
        got = attach(model, Fixed())(tokens).logits
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("merge", MERGES, ids=["mixture", "union"])
@pytest.mark.parametrize("memory", [Fixed(), Counter()], ids=["fixed", "counter"])
def test_the_loss_is_that_of_the_merged_rows(merge, memory):
    lm, tokens = attach(tiny_model(), memory, merge), tiny_tokens(3, 9)
    labels = tokens.clone()
    labels[0, :4] = labels[2, 7:] = -100
    with torch.no_grad():
        output = lm(tokens, labels=labels)
        scores = output.logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        wanted = labels[:, 1:] != -100
        torch.testing.assert_close(output.loss, -scores[wanted].mean())
        summed = lm(tokens, labels=labels, num_items_in_batch=7).loss
        torch.testing.assert_close(summed, -scores[wanted].sum() / 7)
        shifted = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
        given = lm(tokens, labels=labels, shift_labels=shifted).loss
        torch.testing.assert_close(given, output.loss)
        part = lm(tokens, labels=labels, logits_to_keep=3).loss
        torch.testing.assert_close(part, -scores[:, -2:][wanted[:, -2:]].mean())


def test_gradients_reach_every_weight_of_the_base_model():
    lm, tokens = attach(tiny_model(), Fixed(), Mixture(0.3)), tiny_tokens(3, 9)
    lm.train()
    lm(tokens, labels=tokens).loss.backward()
    for name, weight in lm.base.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("merge", MERGES, ids=["mixture", "union"])
def test_the_gradient_is_that_of_the_merged_loss_with_candidates_held_fixed(merge):
    model, memory, tokens = tiny_model("gpt_neox"), Fixed(), tiny_tokens(2, 6)
    attach(model, memory, merge)(tokens, labels=tokens).loss.backward()
    got = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    with torch.no_grad():
        queries = forward_to_tap(model, find_tap(model), tokens).flatten(0, 1)
        candidates, _ = memory.read(queries, None)
    rows_ = merge_logits(merge, model(tokens).logits.flatten(0, 1), candidates).view(2, 6, -1)
    scores = rows_.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])
    (-scores.mean()).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, atol=1e-5, rtol=1e-4)


def test_a_mixture_of_experts_keeps_its_balancing_loss():
    model, tokens = tiny_model("mixtral", output_router_logits=True), tiny_tokens(2, 7)
    with torch.no_grad():
        ours = attach(model, Fixed(), Mixture(0.0))(tokens, labels=tokens)
        theirs = model(tokens, labels=tokens)
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.aux_loss is not None


def test_gradient_checkpointing_trains_the_same():
    tokens, losses = tiny_tokens(2, 7), []
    for checkpointing in (False, True):
        lm = attach(tiny_model(), Fixed()).train()
        if checkpointing:
            newer = getattr(lm, "activation_checkpointing_enable", None)
            (newer or lm.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in lm.base.model.layers)
        loss = lm(tokens, labels=tokens).loss
        loss.backward()
        losses.append((loss.detach(), lm.base.lm_head.weight.grad))
    torch.testing.assert_close(losses[0], losses[1])


def test_outputs_are_the_base_models_kind():
    lm, tokens = attach(tiny_model(), Fixed()), tiny_tokens(1, 5)
    with torch.no_grad():
        output = lm(tokens, output_hidden_states=True, labels=tokens)
        assert type(output) is type(lm.base(tokens))
        assert len(output.hidden_states) == 3
        as_tuple = lm(tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


def test_inputs_embeds_work_without_state():
    lm, tokens = attach(tiny_model(), Fixed()), tiny_tokens(2, 5)
    with torch.no_grad():
        embedded = lm(inputs_embeds=lm.get_input_embeddings()(tokens)).logits
        torch.testing.assert_close(embedded, lm(tokens).logits)


def test_a_memory_with_state_says_what_it_needs():
    lm, tokens = attach(tiny_model(), Counter()), tiny_tokens(2, 5)
    with pytest.raises(InputError, match=r"Counter keeps its state .* use_cache must not be False"):
        lm(tokens, use_cache=False)
    with pytest.raises(InputError, match="input_ids must be given"):
        lm(inputs_embeds=torch.zeros(1, 3, 16))
    foreign = lm.base(tokens, use_cache=True).past_key_values
    with pytest.raises(InputError, match="the cache holds 5 positions that this Counter has not"):
        lm(tokens, past_key_values=foreign)
    other = attach(lm.base, Counter())(tokens).past_key_values
    with pytest.raises(InputError, match="carries another's"):
        lm(tokens, past_key_values=other)
    with torch.no_grad():
        fresh = lm(tokens, past_key_values=DynamicCache()).past_key_values
    assert isinstance(fresh, MemoryCache)
    assert fresh.get_seq_length() == 5
