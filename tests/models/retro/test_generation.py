"""Cached decoding is reading the whole text, whatever the length, the padding and the alignment."""

import pytest
import torch
from transformers import DynamicCache

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.retro.cache import RetroCache
from memlm.models.retro.generation import chunks_of
from memlm.models.retro.grid import chunk_grid, right_offset
from memlm.models.retro.retriever import ChunkRetriever

from .small import CHUNK, POST_NORM, Arithmetic, made_up, small_model

EXACT = {"atol": 1e-10, "rtol": 1e-10}
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prepared(model, tokens, cache=None, **arguments):
    with torch.no_grad():
        ready = model.prepare_inputs_for_generation(
            tokens, past_key_values=cache, retriever=Arithmetic(), **arguments
        )
        return model(**ready, use_cache=cache is not None).logits


@pytest.mark.parametrize("changes", [{}, POST_NORM, {"learned_positions": True}])
@pytest.mark.parametrize("pieces", [[1] * 13, [3, 1, 1, 4, 4], [4, 5, 4], [11, 1, 1], [2, 11]])
def test_in_pieces_as_at_once(pieces, changes):
    model = small_model(**changes)
    tokens = made_up(2, sum(pieces))[0]
    whole = prepared(model, tokens)
    cache, end = RetroCache(), 0
    for piece in pieces:
        end += piece
        found = prepared(model, tokens[:, :end], cache)
        torch.testing.assert_close(found, whole[:, end - piece : end], **EXACT)


@pytest.mark.parametrize("step", [None, 1, 3])
@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("prompt", range(1, 10))
def test_padded_rows_in_steps_as_alone_at_once(prompt, align, step):
    model = small_model()
    total = 14
    tokens = made_up(2, total, seed=prompt)[0]
    short = prompt // 2  # of padding in front of the second row
    real = torch.ones_like(tokens)
    real[1, :short] = 0
    offset = None
    if align == "right":
        offset = right_offset(torch.tensor([prompt, prompt - short]), CHUNK, step)
    cache, found = RetroCache(), []
    for end in range(prompt, total + 1):
        found.append(
            prepared(
                model,
                tokens[:, :end],
                cache,
                attention_mask=real[:, :end],
                chunk_offset=offset,
                retrieval_step=step,
            )
        )
    found = torch.cat(found, dim=1)
    for row, first in ((0, 0), (1, short)):
        alone = prepared(
            model,
            tokens[row : row + 1, first:],
            chunk_offset=None if offset is None else offset[row : row + 1],
            retrieval_step=step,
        )
        torch.testing.assert_close(found[row : row + 1, first:], alone, **EXACT)


@pytest.mark.parametrize(
    "changes", [{}, POST_NORM, {**POST_NORM, "compatibility": "retro_pytorch"}]
)
@pytest.mark.parametrize(
    "arguments", [{}, {"num_beams": 3}, {"align": "right"}, {"retrieval_step": 2}]
)
def test_generate_with_cache_and_without(changes, arguments):
    model = small_model(**changes)
    tokens = made_up(2, 6)[0]
    found = [
        model.generate(
            tokens,
            retriever=Arithmetic(),
            max_new_tokens=9,
            use_cache=use_cache,
            attention_mask=torch.ones_like(tokens),
            **QUIET,
            **arguments,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert found[0].shape == (2, 15)


def test_retrieval_matters_and_happens_once_per_chunk():
    model, retriever = small_model(), Arithmetic()
    assert isinstance(retriever, ChunkRetriever)
    tokens = made_up(1, 6)[0]
    arguments = {"max_new_tokens": 10, "attention_mask": torch.ones_like(tokens), **QUIET}
    written = model.generate(tokens, retriever=retriever, **arguments)
    # 16 tokens; the last is not read any more
    assert retriever.asked == [written[0, i : i + CHUNK].tolist() for i in (0, 4, 8)]
    assert not torch.equal(written, model.generate(tokens, **arguments))


def test_aligned_right_a_short_prompt_retrieves():
    model, retriever = small_model(), Arithmetic()
    tokens = made_up(1, 2)[0]
    arguments = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3, **QUIET}
    model.generate(tokens, retriever=retriever, align="right", **arguments)
    assert retriever.asked == [tokens[0].tolist()]


def test_chunks_of_a_padded_packed_row():
    tokens = torch.arange(12)[None]
    real = torch.arange(12)[None] < 11
    documents = torch.tensor([[0] * 5 + [1] * 7])
    grid = chunk_grid(1, 12, CHUNK, real=real, document_ids=documents)
    assert [chunk.tolist() for chunk in chunks_of(tokens, grid)] == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert grid.positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]
    assert grid.tokens.tolist() == [3, 4, 8, 9, 10]
    assert grid.chunk.tolist() == [0, 0, 1, 1, 1]
    assert grid.slot.tolist() == [0, 1, 0, 1, 2]


def test_refusals():
    model = small_model()
    tokens, neighbours, _ = made_up(1, 6)
    foreign = DynamicCache()
    foreign.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with pytest.raises(InputError, match="must be a RetroCache or empty, got a DynamicCache of 3"):
        model(tokens, past_key_values=foreign)
    cache = model(tokens, neighbours=neighbours).past_key_values
    with pytest.raises(UnsupportedModelError, match="must only grow"):
        cache.crop(1)
    with pytest.raises(InputError, match="neighbours must be given for every chunk"):
        model(tokens, past_key_values=cache)
    with pytest.raises(InputError, match="align must be 'left' or 'right'"):
        model.generate(tokens, align="middle")
    with pytest.raises(InputError, match="must come with their attention_mask"):
        model.generate(tokens * 0, align="right", **QUIET)
    with pytest.raises(InputError, match="arguments it knows, got speed"):
        model(tokens, speed=1)

    class Wrong:
        def retrieve(self, chunks):
            return torch.ones(1, 2, 8).long(), torch.ones(1, 2, 7).bool()

    with pytest.raises(InputError, match=r"a retriever must give \(1, k, length\)"):
        model.generate(tokens, retriever=Wrong(), max_new_tokens=1, **QUIET)


def test_a_reset_cache_is_new():
    model = small_model()
    tokens = made_up(1, 9)[0]
    cache = RetroCache()
    first = prepared(model, tokens, cache)
    cache.reset()
    torch.testing.assert_close(prepared(model, tokens, cache), first, **EXACT)
