"""TRIME (Zhong et al. 2022): language models trained and read with memory under one softmax.

    p(w | c) ~ exp(E_w . f(c)) + sum over memories (c_j, x_j) with x_j = w of exp(g(c) . g(c_j) / s)
                                                                                        (eq. 4)

with s = sqrt(dim) times a temperature, and g(c) the input of the last feed-forward. A memory is a
set of earlier positions and of the tokens that followed them (section 3):

    local      earlier positions of this window                `LocalMemory`
    long-term  positions of the windows before                 `LongMemory`
    external   the nearest entries of a datastore              `KnnMemory`, metric "ip"

`Together` makes one memory of them, `Union` puts it under the model's softmax; as a `Mixture` the
first two are the continuous cache, the baseline without training. Training uses the same equation,
with the batch as memory: `memlm.training.objectives`, ``memlm train --method trime`` (local),
``trime_long`` and ``trime_ext``.

Settings of the paper for WikiText-103, 247 M parameters (section 5; windows of 3,072 tokens): long
12,288, k = 1024, temperature 1.17 for local memory alone, 1.22 with the long one, 1.25 with all.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from memlm.core.config import check
from memlm.core.merges import Mixture, Union
from memlm.core.types import Index, TokenMemory
from memlm.memory.knn import KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory, Overlap
from memlm.memory.together import Together
from memlm.models.attach import MemoryForCausalLM, attach
from memlm.models.cache import MemoryCache
from memlm.models.running import frozen
from memlm.models.taps import forward_to_tap
from memlm.store.reader import Datastore


def trime(
    model: PreTrainedModel,
    store: Datastore | None = None,
    *,
    long: int = 0,
    k: int = 1024,
    temperature: float = 1.0,
    overlap: Overlap = "once",
    index: Index | str = "auto",
    recompute: bool = False,
    interpolate: tuple[float, float] | None = None,
) -> MemoryForCausalLM:
    """``model`` with its local memory, and with a long-term and an external one if asked for.

    Args:
        model: a causal language model; best one that was trained with a TRIME objective.
        store: its datastore with metric "ip" (`ExtractionConfig(metric="ip")`), or None.
        long: positions of earlier windows that are remembered; 0: none.
        k: neighbours per search of the store.
        temperature: beside ``sqrt(dim)``, of all memories.
        overlap: see `LongMemory`; "twice" is what the paper's figures count.
        index: of the store, see `KnnMemory`.
        recompute: exact scores of what an approximate index found, see `KnnMemory`.
        interpolate: (lam, temperature) at which the store is mixed in once more (eq. 7); the
            temperature divides the plain dot product.

    Raises:
        InputError: if there is something to interpolate but no store, the store does not compare
            by dot product, or a number is out of range.
        FingerprintError: if the store was made by another model.
    """
    members = _past(model, long, temperature, overlap)
    check(
        interpolate is None or store is not None,
        f"what is mixed in once more is the datastore, got {interpolate} without one; pass a store",
    )
    again = None
    if store is not None:
        check(
            store.metric == "ip",
            f"TRIME compares keys by dot product, so the store's metric must be 'ip', got "
            f"{store.metric!r}; build the store with metric='ip'",
        )
        scale = temperature * _root_of_dim(model)
        external = KnnMemory(store, k=k, temperature=scale, index=index, recompute=recompute)
        members.append(external)
        if interpolate is not None:
            again = external.changed(external.k, interpolate[1]), Mixture(interpolate[0])
    return attach(model, Together(*members), merge=Union(), interpolate=again)


def continuous_cache(
    model: PreTrainedModel, *, long: int = 0, lam: float = 0.25, temperature: float = 1.0
) -> MemoryForCausalLM:
    """The baseline that needs no training (Grave et al. 2017, eq. 3 and 4).

    The same local and long-term memory, each position a candidate, but as a distribution of their
    own that is mixed in: ``(1 - lam) p_model + lam p_cache``.

    Args:
        model: a causal language model.
        long: positions of earlier windows that are remembered; 0: none.
        lam: weight of the cache, from 0 to 1.
        temperature: beside ``sqrt(dim)``; theta of the paper is ``1 / (sqrt(dim) temperature)``.

    Raises:
        InputError: if a number is out of range.
    """
    members = _past(model, long, temperature, "once")
    return attach(model, Together(*members), merge=Mixture(lam))


def _past(
    model: PreTrainedModel, long: int, temperature: float, overlap: Overlap
) -> list[TokenMemory]:
    """The memories of the text that is read: of this window, and of those before."""
    check(long >= 0, f"long must not be negative, got {long}; 0 is no long-term memory")
    scale = temperature * _root_of_dim(model)
    window = getattr(_text_config(model), "max_position_embeddings", None) or 1 << 16
    members: list[TokenMemory] = [LocalMemory(size=window, temperature=scale)]
    if long:
        members.append(LongMemory(size=long, temperature=scale, overlap=overlap))
    return members


def _root_of_dim(model: PreTrainedModel) -> float:
    return math.sqrt(_text_config(model).hidden_size)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config()


def remember(
    lm: MemoryForCausalLM, input_ids: Tensor, state: Any = None, *, window: int | None = None
) -> Any:
    """Read a text into the long-term memory, window by window, without predicting anything.

    Args:
        lm: from `trime` or `continuous_cache`, with ``long`` above 0.
        input_ids: ``(rows, time)`` int64, the text of each row.
        state: what was read before; None: nothing.
        window: tokens read at once; None: as many as the model has positions for.

    Returns:
        The memory's state, for `begin_with`, for another call, or for a file
        (`memlm.memory.saved_state`).

    Raises:
        InputError: if the model has no long-term memory, or the window is shorter than 2 tokens.
    """
    check(
        getattr(lm.memory, "spans_windows", False),
        f"only a long-term memory reads ahead, got {lm.memory.describe()}; call trime(..., long=n)",
    )
    limit = getattr(_text_config(lm.base), "max_position_embeddings", None)
    length: int = window or limit or 1024
    check(length >= 2, f"window must be at least 2 tokens, got {length}")
    memory: Any = lm.memory
    state = memory.init_state(len(input_ids)) if state is None else state
    with frozen(lm.base):
        # windows share one token: it ends a pair of the first and begins one of the second
        for start in range(0, max(1, input_ids.shape[1] - 1), length - 1):
            tokens = input_ids[:, start : start + length]
            keys = forward_to_tap(lm.base, lm.tap, tokens)
            state = memory.finish(memory.observe(tokens, keys, state))
    return state


def begin_with(lm: MemoryForCausalLM, state: Any, *, rows: int = 1, copies: int = 1) -> MemoryCache:
    """A fresh cache whose memory has read something already: for ``past_key_values``.

    Args:
        lm: from `trime` or `continuous_cache`.
        state: from `remember`, or of the cache that an earlier call returned, after ``finish``.
        rows: how many the state has.
        copies: of each row: the number of beams, or of sequences to return.
    """
    index = torch.arange(rows).repeat_interleave(copies)
    chosen = lm.memory.select_rows(state, index)
    inner = DynamicCache(config=_text_config(lm.base))
    return MemoryCache(inner, lm.memory, chosen, rows * copies)
