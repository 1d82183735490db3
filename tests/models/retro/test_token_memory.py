"""A model that reads neighbours takes a token memory as any other causal language model does."""

import pytest
import torch

import memlm
from memlm.models.attach import attach
from memlm.models.retro.fit import retro_fit
from memlm.models.taps import find_tap, forward_to_tap
from memlm.store.arrays import save_arrays
from memlm.testing.tiny import tiny_model
from tests.models.memories import Counter
from tests.models.retro.small import CHUNK, Arithmetic, made_up, small_model

QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def reader(kind):
    if kind == "retro":
        return small_model(torch.float32, vocab_size=61)
    torch.manual_seed(0)
    model = retro_fit(tiny_model(), chunk_size=CHUNK)
    with torch.no_grad():
        for gate in model.gates.values():
            gate.fill_(0.8)
    return model.eval()


@pytest.fixture(params=["retro", "fit"])
def model(request):
    return reader(request.param)


@pytest.fixture
def store(model, tmp_path):
    tokens = made_up(4, 24, seed=7)[0]
    with torch.no_grad():
        keys = forward_to_tap(model, find_tap(model), tokens)
    return save_arrays(tmp_path / "store", keys[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_the_key_is_what_enters_the_last_feed_forward():
    model = reader("retro")
    tap = find_tap(model)
    assert (tap.name, tap.module, tap.side) == ("ffn_input", "model.layers.2.feed.inner", "input")
    tokens, seen = made_up(2, 11)[0], []
    handle = model.model.layers[2].feed.inner.expand.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        keys = forward_to_tap(model, tap, tokens)
        model(tokens)
    handle.remove()
    assert torch.equal(keys, seen[-1])


def test_a_memory_that_is_off_changes_nothing(model, store):
    tokens, neighbours, mask = made_up(2, 11)
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    memory = memlm.KnnMemory(store, k=4)
    with torch.no_grad():
        alone = model(tokens, **given).logits
        off = attach(model, memory, memlm.Mixture(0.0), tap=find_tap(model).name)
        assert torch.equal(off(tokens, **given).logits, alone)
        on = attach(model, memory, memlm.Mixture(0.5), tap=find_tap(model).name)
        assert (on(tokens, **given).logits.softmax(-1) - alone.softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("choice", [{}, {"num_beams": 3}, {"align": "right"}])
def test_generation_retrieves_and_remembers(model, store, choice):
    memory = memlm.KnnMemory(store, k=4)
    lm = attach(model, memory, memlm.Mixture(0.1), tap=find_tap(model).name)
    retriever = Arithmetic()
    tokens = made_up(2, 6)[0]
    real = torch.ones_like(tokens)
    real[1, :2] = 0
    arguments = {"max_new_tokens": 7, "attention_mask": real, **QUIET, **choice}
    written = lm.generate(tokens, retriever=retriever, **arguments)
    assert len(retriever.asked) > 0
    assert written.shape == (2, 13)
    assert not torch.equal(written, lm.generate(tokens, **arguments))
    again = lm.generate(tokens, retriever=Arithmetic(), use_cache=False, **arguments)
    assert torch.equal(written, again)


@pytest.mark.parametrize("made", [Counter, memlm.LocalMemory])
@pytest.mark.parametrize("align", ["left", "right"])
def test_two_states_ride_on_one_cache(model, made, align):
    """The scores of cached steps are those of whole texts, with neighbours and the memory's."""
    lm = attach(model, made(), memlm.Mixture(0.3))
    tokens, steps = made_up(2, 6)[0], 7
    arguments = {"max_new_tokens": steps, "align": align, **QUIET}
    arguments |= {"output_scores": True, "return_dict_in_generate": True}
    with_neighbours = lm.generate(tokens, retriever=Arithmetic(), **arguments)
    without = lm.generate(tokens, **arguments)
    offset = model.retrieval_arguments(tokens, align=align).get("chunk_offset")
    for output, retriever in ((with_neighbours, Arithmetic()), (without, None)):
        scores, written = torch.stack(output.scores, 1), output.sequences
        neighbours = model.retrieved(retriever, written, None, None, chunk_offset=offset)
        with torch.no_grad():
            whole = lm(written, chunk_offset=offset, **neighbours).logits[:, 5:-1]
        assert torch.allclose(scores.log_softmax(-1), whole.log_softmax(-1), atol=1e-5)
    first, second = (one.scores[0].softmax(-1) for one in (with_neighbours, without))
    assert (first - second).abs().max() > 1e-4


def test_beams_take_both_states_along(model):
    lm = attach(model, Counter(), memlm.Mixture(0.01))
    tokens = made_up(2, 6)[0]
    arguments = {"max_new_tokens": 7, "num_beams": 3, "return_dict_in_generate": True, **QUIET}
    output = lm.generate(tokens, retriever=Arithmetic(), output_scores=True, **arguments)
    written = output.sequences
    neighbours = model.retrieved(Arithmetic(), written, None, None)
    with torch.no_grad():
        logs = lm(written, **neighbours).logits.log_softmax(-1)[:, 5:-1]
    summed = logs.gather(-1, written[:, 6:, None]).sum((1, 2)) / 7
    assert torch.allclose(output.sequences_scores, summed, atol=1e-5)
    alone = lm.generate(tokens, output_scores=True, **arguments)
    assert (alone.sequences_scores - output.sequences_scores).abs().max() > 1e-4
