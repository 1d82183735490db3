"""RETRO-fit: any causal language model reads neighbours, and without them is what it was."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from memlm.core.errors import FingerprintError, InputError, UnsupportedModelError
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.fit import RetroFitForCausalLM, retro_fit
from memlm.testing.tiny import FAMILIES, tiny_model, tiny_tokens
from tests.models.retro.small import CHUNK, VOCABULARY, Arithmetic, made_up

EXACT = {"atol": 1e-9, "rtol": 1e-9}
SETTINGS = {"chunk_size": CHUNK, "cross_attention_layers": (1, 2), "encoder_hidden_size": 12}
SOME = ["llama", "gpt2", "gpt_neox", "qwen2"]
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def fitted(family="llama", *, closed=False, dtype=torch.float64, **changes):
    """A tiny model in float64 with new parts whose weights, and gates, are wide open."""
    torch.manual_seed(0)
    model = retro_fit(
        tiny_model(family).to(dtype), **{**SETTINGS, "initializer": "torch"} | changes
    )
    with torch.no_grad():
        for gate in model.gates.values():
            gate.fill_(0.0 if closed else 0.8)
    return model.eval()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"memlm_retro"}))
def test_closed_or_without_neighbours_it_is_the_base_bit_for_bit(family):
    base = tiny_model(family)
    tokens, neighbours, mask = made_up(2, 11)
    real = torch.ones_like(tokens)
    real[1, 8:] = 0
    with torch.no_grad():
        # with a cache, attention of some families rounds otherwise
        plain = {use: base(tokens, use_cache=use).logits for use in (True, False)}
        padded = {
            use: base(tokens, attention_mask=real, use_cache=use).logits for use in (True, False)
        }
    model = retro_fit(base, **SETTINGS)
    with torch.no_grad():
        given = {"neighbours": neighbours, "neighbour_mask": mask, "use_cache": True}
        assert torch.equal(model(tokens, **given).logits, plain[True])
        for gate in model.gates.values():
            gate.fill_(0.8)
        for use in (True, False):
            assert torch.equal(model(tokens, use_cache=use).logits, plain[use])
            found = model(tokens, attention_mask=real, use_cache=use).logits
            assert torch.equal(found, padded[use])
        opened = model(tokens, **given).logits
    first = CHUNK - 1
    torch.testing.assert_close(opened[:, :first], plain[True][:, :first], atol=1e-4, rtol=1e-4)
    assert (opened[:, first] - plain[True][:, first]).abs().max() > 1e-3
    assert model.detach() is base
    with torch.no_grad():
        assert torch.equal(base(tokens, use_cache=True).logits, plain[True])


def test_a_model_in_half_precision_keeps_its_bits():
    base = tiny_model().to(torch.bfloat16)
    tokens, neighbours, _ = made_up(2, 11)
    with torch.no_grad():
        expected = base(tokens).logits
        model = retro_fit(base, **SETTINGS)
        assert model.encoder.output.weight.dtype == torch.float32
        assert torch.equal(model(tokens, neighbours=neighbours).logits, expected)


@pytest.mark.parametrize("family", SOME)
def test_no_token_sees_what_comes_later(family):
    model = fitted(family)
    tokens, neighbours, mask = made_up(1, 3 * CHUNK + 2)
    with torch.no_grad():
        before = model(tokens, neighbours=neighbours, neighbour_mask=mask).logits
        for chunk in range(3):
            others = neighbours.clone()
            others[:, chunk] = 1 + others[:, chunk] % (VOCABULARY - 1)
            after = model(tokens, neighbours=others, neighbour_mask=mask).logits
            first = (chunk + 1) * CHUNK - 1
            torch.testing.assert_close(after[:, :first], before[:, :first], **EXACT)
            assert not torch.allclose(after[:, first], before[:, first], **EXACT)
        for place in (2, 5, 9):
            changed = tokens.clone()
            changed[:, place] = 1 + changed[:, place] % (VOCABULARY - 1)
            after = model(changed, neighbours=neighbours, neighbour_mask=mask).logits
            torch.testing.assert_close(after[:, :place], before[:, :place], **EXACT)


def prepared(model, tokens, cache=None, **arguments):
    with torch.no_grad():
        ready = model.prepare_inputs_for_generation(
            tokens,
            past_key_values=cache,
            next_sequence_length=None if cache is None else tokens.shape[1] - len_of(cache),
            retriever=Arithmetic(),
            **arguments,
        )
        return model(**{**ready, "use_cache": cache is not None})


def len_of(cache):
    return int(cache.get_seq_length())


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("pieces", [[1] * 13, [3, 1, 1, 4, 4], [4, 5, 4], [2, 11]])
def test_in_pieces_as_at_once(pieces, family):
    model = fitted(family)
    tokens = made_up(2, sum(pieces))[0]
    whole = prepared(model, tokens).logits
    cache, end = RetroCache(), 0
    for piece in pieces:
        end += piece
        output = prepared(model, tokens[:, :end], cache)
        cache = output.past_key_values
        assert isinstance(cache, RetroCache)
        torch.testing.assert_close(output.logits, whole[:, end - piece : end], **EXACT)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"align": "right"}, {"retrieval_step": 2}]
)
def test_generate_with_cache_and_without(family, arguments):
    model, tokens = fitted(family), made_up(2, 6)[0]
    real = torch.ones_like(tokens)
    real[1, :2] = 0
    found = [
        model.generate(
            tokens,
            retriever=Arithmetic(),
            max_new_tokens=9,
            use_cache=use_cache,
            attention_mask=real,
            **QUIET,
            **arguments,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert found[0].shape == (2, 15)


def test_retrieval_happens_once_per_chunk_and_off_is_the_base():
    base = tiny_model()
    tokens = made_up(1, 6)[0]
    arguments = {"max_new_tokens": 10, "attention_mask": torch.ones_like(tokens), **QUIET}
    expected = base.generate(tokens, **arguments)
    model, retriever = fitted(dtype=torch.float32, initializer_range=1.0), Arithmetic()
    written = model.generate(tokens, retriever=retriever, **arguments)
    assert retriever.asked == [written[0, i : i + CHUNK].tolist() for i in (0, 4, 8)]
    assert torch.equal(model.generate(tokens, **arguments), expected)


@pytest.mark.parametrize("family", SOME)
def test_documents_of_one_row_are_read_apart(family):
    model = fitted(family)
    tokens, neighbours, mask = made_up(1, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    with torch.no_grad():
        packed = model(
            tokens,
            neighbours=neighbours[:, :2],
            neighbour_mask=mask[:, :2],
            document_ids=documents,
            use_cache=False,
        ).logits
        for part, chunk in ((slice(0, 5), 0), (slice(5, 12), 1)):
            alone = model(
                tokens[:, part],
                neighbours=neighbours[:, chunk : chunk + 1],
                neighbour_mask=mask[:, chunk : chunk + 1],
            ).logits
            # the base model's own tables may be in float32
            torch.testing.assert_close(packed[:, part], alone, atol=1e-5, rtol=1e-5)


def test_only_new_weights_learn():
    model = fitted(dtype=torch.float32).train()
    assert not model.base.training
    before = copy.deepcopy(model.state_dict())
    tokens, neighbours, mask = made_up(2, 11)
    given = {"neighbours": neighbours, "neighbour_mask": mask, "labels": tokens}
    model(tokens, **given).loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == name.startswith("base."), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == name.startswith("base."), name
    model.detach()
    assert all(weight.requires_grad for weight in model.base.parameters())


def test_a_batch_without_chunks_still_has_gradients():
    model = fitted(dtype=torch.float32).train()
    tokens, neighbours = made_up(2, CHUNK - 1)[0], torch.ones(2, 0, 2, 2 * CHUNK).long()
    loss = model(tokens, neighbours=neighbours, labels=tokens).loss
    loss.backward()
    for name, weight in model.named_parameters():
        if not name.startswith("base."):
            assert weight.grad is not None, name
            assert not weight.grad.any()
    assert torch.equal(loss, model.base(tokens, labels=tokens).loss)


def test_only_new_weights_are_saved_and_the_base_must_be_the_same(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = retro_fit(base, **SETTINGS)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.fill_(0.5)
    model.save_pretrained(tmp_path / "fit")
    assert not (tmp_path / "fit" / "base").exists()
    tokens, neighbours, mask = made_up(2, 11)
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        expected = model(tokens, **given).logits
        for again in (
            RetroFitForCausalLM.from_pretrained(tmp_path / "fit"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "fit"),
            RetroFitForCausalLM.from_pretrained(tmp_path / "fit", base=base),
        ):
            assert torch.equal(again(tokens, **given).logits, expected)
    with pytest.raises(FingerprintError, match="was saved with base model"):
        RetroFitForCausalLM.from_pretrained(tmp_path / "fit", base=tiny_model(seed=1))
    model.save_pretrained(tmp_path / "whole", base="copy")
    with torch.no_grad():
        moved = RetroFitForCausalLM.from_pretrained(tmp_path / "whole")
        assert torch.equal(moved(tokens, **given).logits, expected)


def test_a_base_without_a_name_is_asked_for(tmp_path):
    base = tiny_model()
    retro_fit(base, **SETTINGS).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a base model without a name, so it must be given"):
        RetroFitForCausalLM.from_pretrained(tmp_path)
    RetroFitForCausalLM.from_pretrained(tmp_path, base=base)


def test_refusals():
    model = fitted()
    tokens, neighbours, _ = made_up(1, 6)
    with pytest.raises(InputError, match="must not read neighbours yet"):
        retro_fit(model)
    with pytest.raises(InputError, match="the base model decides hidden_size; leave that out"):
        retro_fit(tiny_model(), hidden_size=8)
    with pytest.raises(InputError, match="layer numbers from 1 to 2"):
        retro_fit(tiny_model(), cross_attention_layers=(3,))
    with torch.no_grad():
        foreign = model.base(tokens).past_key_values
        with pytest.raises(InputError, match="the cache holds 6 positions that were read without"):
            model(tokens, neighbours=neighbours, past_key_values=foreign)
        with pytest.raises(UnsupportedModelError, match="must only grow"):
            model(tokens, neighbours=neighbours).past_key_values.crop(1)
        documents = torch.tensor([[0] * 5 + [1] * 7])
        bloom = fitted("bloom", dtype=torch.float32)
        with pytest.raises(UnsupportedModelError, match="must read documents of one row apart"):
            bloom(tiny_tokens(1, 12), document_ids=documents)
        gemma = fitted("gemma2", dtype=torch.float32)
        with pytest.raises(UnsupportedModelError, match="at most 8 tokens, the sliding window"):
            gemma(tiny_tokens(1, 12), document_ids=documents)
