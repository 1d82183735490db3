"""Systems together: what a model with memory says, is its base model's word merged by hand.

Each case joins some of: a datastore searched or walked, local and long-term memory, Lambda
attention with and without middle tokens, models that read neighbours, untied positions. Each is
generated from step by step, with beams, with padding on the left, and saved and loaded.
"""

import pytest
import torch
from torch.testing import assert_close

import memlm
from memlm.core.errors import UnsupportedModelError
from memlm.core.merges import Mixture, Shares, Union
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.models.extend import extend_context, is_extended
from memlm.models.fingerprint import model_hash
from memlm.models.retro.fit import retro_fit
from memlm.models.taps import capture, find_tap, forward_to_tap, reached
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForCausalLM
from memlm.ops.merge import merge_logits
from memlm.ops.middle_rule import MiddleConfig
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model, tiny_tokens

LENGTH, PROMPT, WINDOW = 26, 9, 10
GREEDY = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "max_new_tokens": LENGTH - PROMPT,
    "return_dict_in_generate": True,
    "output_scores": True,
}
CLOSE = {"atol": 2e-4, "rtol": 0}


def llama(path):
    model = tiny_model("llama")
    return model, store_of(model, path)


def fitted(path):
    """A Llama that reads neighbours, its gates open."""
    model = retro_fit(tiny_model("llama"), chunk_size=4, cross_attention_layers=(1, 2))
    with torch.no_grad():
        for gate in model.gates.values():
            gate.fill_(0.8)
    return model.eval(), store_of(model, path)


def store_of(model, path):
    tokens, tap = tiny_tokens(8, 30, seed=5), find_tap(model)
    with torch.no_grad():
        keys = forward_to_tap(model, tap, tokens)[:, :-1].flatten(0, 1)
    return save_arrays(
        path, keys, tokens[:, 1:].flatten(), model_hash=model_hash(model), tap=tap.name
    )


def searched(store):
    return KnnMemory(store, k=6, temperature=8.0)


def walked(store):
    return AutomatonMemory(store, k=6, temperature=8.0, min_knns=1)


def read_before():
    return LocalMemory(size=8, temperature=4.0), LongMemory(size=64, temperature=4.0)


def extended(model, **more):
    return extend_context(model, window=WINDOW, sinks=2, **more)


def searched_and_extended(path):
    model, store = llama(path)
    return attach(extended(model), searched(store), Mixture(0.3))


def extended_afterwards(path):
    model, store = llama(path)
    lm = attach(model, searched(store), Mixture(0.3))
    extended(lm)
    return lm


def walked_and_extended(path):
    model, store = llama(path)
    return attach(extended(model), walked(store), Mixture(0.3))


def middle_tokens(path):
    model, store = llama(path)
    extended(model, middle=MiddleConfig(k=4, block=2, first_layer=0))
    return attach(model, searched(store), Mixture(0.3))


def all_under_one_softmax(path):
    model, store = llama(path)
    members = Together(*read_before(), searched(store), walked(store))
    return attach(extended(model), members, Union())


def all_with_shares(path):
    model, store = llama(path)
    members = Together(*read_before(), searched(store), walked(store), lams=(0.1, 0.1, 0.2, 0.2))
    return attach(model, members, Shares())


def neighbours_and_memory(path):
    model, store = fitted(path)
    return attach(model, Together(searched(store), walked(store), lams=(0.2, 0.2)), Shares())


def neighbours_memory_and_window(path):
    model, store = fitted(path)
    return attach(extended(model), searched(store), Mixture(0.3))


def untied_positions(path):
    torch.manual_seed(0)
    model = TupeForCausalLM(TupeConfig.preset("tiny", "tupe-r", vocab_size=61)).eval()
    members = Together(*read_before(), searched(store_of(model, path)))
    return attach(model, members, Union())


CASES = [
    searched_and_extended,
    extended_afterwards,
    walked_and_extended,
    middle_tokens,
    all_under_one_softmax,
    all_with_shares,
    neighbours_and_memory,
    neighbours_memory_and_window,
    untied_positions,
]


@pytest.fixture(params=CASES, ids=lambda case: case.__name__)
def lm(request, tmp_path):
    return request.param(tmp_path / "store")


def log_probs(lm, tokens):
    with torch.no_grad():
        return lm(tokens).logits.log_softmax(-1)


def by_hand(lm, tokens):
    """Position by position: what the base model says, merged with what the memory says."""
    with torch.no_grad(), capture(lm.base, lm.tap) as seen:
        logits = lm.base(tokens).logits
    queries, state, rows = reached(seen, lm.tap), lm.memory.init_state(len(tokens)), []
    for at in range(tokens.shape[1]):
        if state is not None:
            here = slice(at, at + 1)
            state = lm.memory.observe(tokens[:, here], queries[:, here], state)
        candidates, state = lm.memory.read(queries[:, at], state)
        rows.append(merge_logits(lm.merge, logits[:, at], candidates))
    return torch.stack(rows, dim=1).log_softmax(-1)


def generate(lm, prompt, mask=None, **more):
    mask = torch.ones_like(prompt) if mask is None else mask
    return lm.generate(prompt, attention_mask=mask, **{**GREEDY, **more})


def step_scores(made):
    return torch.stack(made.scores, dim=1).log_softmax(-1)


def test_a_forward_pass_is_the_merge_by_hand(lm):
    tokens = tiny_tokens(2, LENGTH)
    found = log_probs(lm, tokens)
    assert_close(found, by_hand(lm, tokens), **CLOSE)
    assert not torch.allclose(found, log_probs(lm.base, tokens), atol=0.1)  # it has an effect


def test_steps_and_beams_are_the_forward_pass(lm):
    prompt = tiny_tokens(2, PROMPT)
    made = generate(lm, prompt)
    assert_close(step_scores(made), log_probs(lm, made.sequences)[:, PROMPT - 1 : -1], **CLOSE)
    best = generate(lm, prompt, num_beams=3, length_penalty=0.0)
    rows = log_probs(lm, best.sequences)[:, PROMPT - 1 : -1]
    total = rows.gather(-1, best.sequences[:, PROMPT:, None])[..., 0].sum(1)
    assert_close(total, best.sequences_scores, atol=1e-3, rtol=0)


def test_left_padding_changes_nothing(lm):
    prompt = tiny_tokens(2, PROMPT)
    padded, mask = prompt.clone(), torch.ones_like(prompt)
    padded[0, :4] = mask[0, :4] = 0
    both, alone = generate(lm, padded, mask), generate(lm, prompt[:1, 4:])
    assert torch.equal(both.sequences[0, 4:], alone.sequences[0])
    assert_close(step_scores(both)[:1], step_scores(alone), **CLOSE)


def test_it_is_saved_whole(lm, tmp_path):
    lm.save_pretrained(tmp_path / "saved")
    again = MemoryForCausalLM.from_pretrained(tmp_path / "saved")
    assert is_extended(again) == is_extended(lm)
    tokens = tiny_tokens(2, LENGTH)
    assert torch.equal(log_probs(again, tokens), log_probs(lm, tokens))


def test_what_cannot_be_joined_says_so():
    model = TupeForCausalLM(TupeConfig.preset("tiny", "tupe-r", vocab_size=61)).eval()
    for other in (model, tiny_model("gpt2")):
        with pytest.raises(UnsupportedModelError, match="extend_context knows the families"):
            memlm.extend_context(other, window=WINDOW)
