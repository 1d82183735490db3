"""A key-value cache that carries a memory's state, so that beams, crops and copies take it along.

``generate`` reorders, repeats and crops only what rides on the cache it was handed. A memory that
remembers something per sequence (an automaton's pointers, a local memory's keys) therefore keeps
its state here:

    beam search          reorder_cache(rows)         -> memory.select_rows(state, rows)
    assisted decoding    crop(-tokens)               -> memory.crop(state, positions left)
    several returns      batch_repeat_interleave(n)  -> memory.select_rows(state, each row n times)

The class shares the layers of the cache it is made around and adds nothing to them: keys and values
stay where the model put them, and every kind of layer (dynamic, sliding, static, quantised) works.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.core.types import TokenMemory


class CarryingCache(Cache, ABC):
    """The layers of another cache, and beside them something with one row per sequence.

    What is done to rows is done to the other cache first, which may itself carry something.

    Attributes:
        inner: the other cache.
    """

    inner: Cache

    def __init__(self, inner: Cache):
        """Take over ``inner``'s layers.

        Raises:
            UnsupportedModelError: for an encoder-decoder cache.
        """
        if isinstance(inner, EncoderDecoderCache):
            raise UnsupportedModelError(
                "a memory rides on the cache of a decoder-only model, got an EncoderDecoderCache; "
                "attach it to a causal language model"
            )
        # The same layer list and settings: both objects are views of one cache from now on.
        vars(self).update(vars(inner))
        self.inner = inner

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` continues what row ``beam_idx[i]`` was (beam search)."""
        self.inner.reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` ``(rows,)``."""
        self.inner.batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies beside each other."""
        self.inner.batch_repeat_interleave(repeats)
        self._select(torch.arange(self._rows()).repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything, keep the allocated layers."""
        self.inner.reset()

    @abstractmethod
    def _rows(self) -> int:
        """How many sequences there are (beams count)."""

    @abstractmethod
    def _select(self, index: Tensor) -> None:
        """Keep the rows ``index`` of what is carried."""


class MemoryCache(CarryingCache):
    """The layers of another cache, and the state of a memory beside them.

    Attributes:
        memory: whose state it is; shared by all copies of the cache.
        state: what the memory made of the ``rows`` sequences so far.
        rows: how many sequences there are (beams count).
    """

    memory: TokenMemory
    state: Any
    rows: int

    def __init__(self, inner: Cache, memory: TokenMemory, state: Any, rows: int):
        super().__init__(inner)
        self.memory = memory
        self.state = state
        self.rows = rows

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take back positions; arguments as in ``transformers``' ``Cache.crop``."""
        before = int(self.get_seq_length())
        self.inner.crop(*args, **kwargs)
        if (after := int(self.get_seq_length())) != before:
            self.state = self.memory.crop(self.state, after)

    def reset(self) -> None:
        """Forget everything, keep the allocated layers."""
        super().reset()
        self.state = self.memory.init_state(self.rows)

    def stats(self) -> dict[str, Any]:
        """The memory's figures for these sequences."""
        return self.memory.stats(self.state)

    def _rows(self) -> int:
        return self.rows

    def _select(self, index: Tensor) -> None:
        self.state = self.memory.select_rows(self.state, index)
        self.rows = len(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A prompt's cache is copied to reuse it; the memory (a whole store) must not be.
        memo[id(self.memory)] = self.memory
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin


def state_before(
    memory: TokenMemory, input_ids: Tensor | None, cache: Cache | None, use_cache: bool | None
) -> tuple[Any, bool]:
    """A memory's state before a pass over new tokens, and whether it has any.

    Args:
        memory: whose state.
        input_ids: ``(batch, time)``, the new tokens.
        cache: what the pass is given.
        use_cache: alike.

    Raises:
        InputError: if a memory with state has no tokens, no cache, or a cache without its state.
    """
    if isinstance(cache, MemoryCache):
        if cache.memory is not memory:
            raise InputError(
                "the cache must carry the state of this model's memory but carries another's; "
                "start with a fresh cache"
            )
        return cache.state, True
    state = memory.init_state(1 if input_ids is None else len(input_ids))
    if state is None:
        return None, False
    kind = type(memory).__name__
    if input_ids is None:
        raise InputError(
            f"a {kind} follows the tokens of the text, so input_ids must be given; got "
            "inputs_embeds only"
        )
    if use_cache is False:
        raise InputError(
            f"a {kind} keeps its state on the cache, so use_cache must not be False; leave it "
            "out or set it to True"
        )
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError(
            f"the cache holds {int(cache.get_seq_length())} positions that this {kind} has not "
            "read; pass the past_key_values of this model's own output, or a fresh cache"
        )
    return state, True


def carry(cache: Cache | None, memory: TokenMemory, state: Any, rows: int) -> Cache | None:
    """A cache with the state after a pass; None stays None, as under gradient checkpointing."""
    if isinstance(cache, MemoryCache):
        cache.state = state
        return cache
    return None if cache is None else MemoryCache(cache, memory, state, rows)
