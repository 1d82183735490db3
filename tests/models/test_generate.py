"""generate(): every decoding mode agrees with rescoring, and idle memories change nothing."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from memlm.core.errors import InputError
from memlm.core.merges import Mixture, Union
from memlm.memory.local import LocalMemory
from memlm.models.attach import attach
from memlm.models.cache import MemoryCache
from memlm.testing.tiny import FAMILIES, tiny_model, tiny_tokens

from .memories import Counter, Fixed
from .test_forward import left_padded, right_padded

PROMPT, NEW = 6, 9
ANY = {"min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
GREEDY = {**ANY, "do_sample": False}
MEMORIES = {
    "fixed": Fixed,  # no state
    "counter": Counter,  # a state that depends on every token
    "local": lambda: LocalMemory(size=6, temperature=4.0),  # a state of tensors
}


@pytest.fixture(params=MEMORIES)
def memory(request):
    return MEMORIES[request.param]()


def scores_of(lm, tokens, first: int = PROMPT) -> torch.Tensor:
    """Sum of log-probabilities ``(rows,)`` of what follows the prompt, teacher-forced."""
    with torch.no_grad():
        logp = lm(tokens).logits.log_softmax(-1)[:, first - 1 : -1]
    return logp.gather(-1, tokens[:, first:, None])[..., 0].sum(-1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bloom", "opt", "gpt_neo", "cohere"])
@pytest.mark.parametrize("merge", [Mixture(0.6), Union()], ids=["mixture", "union"])
def test_greedy_is_the_argmax_of_the_merged_rows(family, memory, merge):
    lm, tokens = attach(tiny_model(family), memory, merge), tiny_tokens(3, PROMPT)
    made = lm.generate(tokens, **GREEDY)
    assert torch.equal(made[:, :PROMPT], tokens)
    with torch.no_grad():
        rows = lm(made).logits[:, PROMPT - 1 : -1].clone()
    rows[..., 2] = -torch.inf  # min_new_tokens forbids the end token
    assert torch.equal(rows.argmax(-1), made[:, PROMPT:])
    if not isinstance(memory, LocalMemory):  # whose few candidates may agree with the model
        assert not torch.equal(made, lm.base.generate(tokens, **GREEDY))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_idle_memory_generates_what_the_model_does(family):
    model, tokens = tiny_model(family), tiny_tokens(2, PROMPT)
    expected = model.generate(tokens, **GREEDY)
    assert torch.equal(attach(model, Fixed(), Mixture(0.0)).generate(tokens, **GREEDY), expected)
    assert torch.equal(attach(model, Fixed(share=0.0)).generate(tokens, **GREEDY), expected)
    assert torch.equal(attach(model, Counter(), Mixture(0.0)).generate(tokens, **GREEDY), expected)


@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 4},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
        {"penalty_alpha": None, "repetition_penalty": 1.3},
    ],
    ids=["beams", "sampling", "beam sampling", "processor"],
)
def test_an_idle_memory_changes_no_decoding_mode(mode):
    model, tokens = tiny_model(), tiny_tokens(2, PROMPT)
    torch.manual_seed(1)
    expected = model.generate(tokens, **ANY, **mode)
    torch.manual_seed(1)
    assert torch.equal(
        attach(model, Fixed(), Mixture(0.0)).generate(tokens, **ANY, **mode), expected
    )


@pytest.mark.parametrize("mode", [{"num_beams": 4}, {"num_beams": 3, "do_sample": True}])
def test_beams_carry_the_state_of_the_row_they_continue(memory, mode):
    """The score summed along a beam is the teacher-forced score of its text: nothing got mixed."""
    torch.manual_seed(0)
    lm, tokens = attach(tiny_model(), memory, Mixture(0.5)), tiny_tokens(2, PROMPT)
    made = lm.generate(
        tokens,
        **{**GREEDY, "min_new_tokens": None, "eos_token_id": None, **mode},
        num_return_sequences=mode["num_beams"],
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    # beams must really have changed rows, or the test would prove nothing
    origins = made.beam_indices.sort(dim=0).values
    assert (made.beam_indices[:, 1:] != made.beam_indices[:, :-1]).any(), origins
    along = made.sequences_scores
    if "do_sample" not in mode:
        torch.testing.assert_close(along, scores_of(lm, made.sequences), atol=1e-4, rtol=0)
    else:  # sampled beams keep the order of their scores only in sum
        summed = lm.compute_transition_scores(made.sequences, made.scores, made.beam_indices)
        torch.testing.assert_close(summed.sum(1), scores_of(lm, made.sequences), atol=1e-4, rtol=0)


def test_a_cache_that_forgets_its_state_fails_the_beam_test(monkeypatch):
    """The proof that the test above can fail."""
    monkeypatch.setattr(MemoryCache, "_select", lambda self, index: None)
    with pytest.raises(AssertionError):
        test_beams_carry_the_state_of_the_row_they_continue(Counter(), {"num_beams": 4})


def test_one_beam_is_greedy(memory):
    lm, tokens = attach(tiny_model(), memory), tiny_tokens(2, PROMPT)
    assert torch.equal(lm.generate(tokens, **GREEDY, num_beams=1), lm.generate(tokens, **GREEDY))


def test_several_returns_are_drawn_with_states_of_their_own(memory):
    torch.manual_seed(3)
    lm, tokens = attach(tiny_model(), memory, Mixture(0.5)), tiny_tokens(2, PROMPT)
    made = lm.generate(
        tokens,
        **ANY,
        do_sample=True,
        top_k=0,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(row) for row in made.sequences.tolist()}) > 2
    with torch.no_grad():
        rows = lm(made.sequences).logits[:, PROMPT - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), rows, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("pad", [left_padded, right_padded], ids=["left", "right"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padding_generates_what_single_rows_do(family, memory, pad, mode):
    lm, tokens, lengths = attach(tiny_model(family), memory), tiny_tokens(3, 7), [7, 3, 5]
    padded, mask = pad(tokens, lengths)
    made = lm.generate(padded, attention_mask=mask, **GREEDY, **mode)
    assert made.shape == (3, 7 + NEW)
    for row, length in enumerate(lengths):
        alone = lm.generate(tokens[row : row + 1, :length], **GREEDY, **mode)[0]
        assert torch.equal(made[row, 7:], alone[length:])
        assert torch.equal(made[row, 7 - length : 7], tokens[row, :length])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_assisted_decoding_takes_back_what_was_refused(family, memory):
    lm, tokens = attach(tiny_model(family), memory), tiny_tokens(1, PROMPT).repeat(1, 3)
    expected = lm.generate(tokens, **GREEDY)
    made = lm.generate(tokens, **GREEDY, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert torch.equal(made.sequences, expected)
    if isinstance(memory, Counter):
        # the last token is never read; everything refused was taken back
        assert made.past_key_values.state.seen == (tuple(expected[0, :-1].tolist()),)


@pytest.mark.parametrize(
    "extra",
    [{"prefill_chunk_size": 2}, {"cache_implementation": "static"}],
    ids=["chunks", "static"],
)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_other_caches_give_the_same_text(family, memory, extra):
    lm = attach(tiny_model(family), memory)
    padded, mask = left_padded(tiny_tokens(2, 7), [7, 4])
    inputs = {"input_ids": padded, "attention_mask": mask}
    assert torch.equal(lm.generate(**inputs, **GREEDY, **extra), lm.generate(**inputs, **GREEDY))


def test_a_conversation_goes_on_from_the_cache_it_was_given(memory):
    lm, tokens = attach(tiny_model(), memory), tiny_tokens(1, PROMPT)
    first = lm.generate(tokens, **GREEDY, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, tiny_tokens(1, 3, seed=5)], 1)
    went_on = lm.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(went_on, lm.generate(longer, **GREEDY))


def test_a_memory_with_state_does_not_generate_without_a_cache():
    lm, tokens = attach(tiny_model(), Counter()), tiny_tokens(1, PROMPT)
    with pytest.raises(InputError, match="use_cache must not be False"):
        lm.generate(tokens, **GREEDY, use_cache=False)


def test_a_memory_without_state_generates_without_a_cache():
    lm, tokens = attach(tiny_model(), Fixed()), tiny_tokens(2, PROMPT)
    assert torch.equal(
        lm.generate(tokens, **GREEDY, use_cache=False), lm.generate(tokens, **GREEDY)
    )


def test_a_misspelt_argument_is_refused_as_on_any_model():
    lm = attach(tiny_model(), Fixed())
    with pytest.raises(ValueError, match="max_newtokens"):
        lm.generate(tiny_tokens(1, 3), max_newtokens=3)


def test_the_base_models_generation_settings_are_used_and_kept():
    model, tokens = tiny_model(), tiny_tokens(1, PROMPT)
    model.generation_config.max_new_tokens = 4
    lm = attach(model, Fixed())
    assert lm.generate(tokens, do_sample=False).shape[1] <= PROMPT + 4
    lm.generation_config.max_new_tokens = 2
    assert model.generation_config.max_new_tokens == 4
    assert not model.generation_config.disable_compile


def test_the_models_own_static_cache_can_be_passed(memory):
    lm, tokens = attach(tiny_model(), memory), tiny_tokens(2, PROMPT)
    for cache in (DynamicCache(), StaticCache(lm.config.get_text_config(), max_cache_len=32)):
        assert torch.equal(
            lm.generate(tokens, past_key_values=cache, **GREEDY), lm.generate(tokens, **GREEDY)
        )
