"""Where an index gets keys from: anything that yields them in blocks and gathers some by number.

A datastore on disk offers this, and so does a tensor through `TensorKeys`; an index needs to know
nothing else about either, and never has all keys in memory unless they came that way.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.index.metrics import prepare_keys

_BLOCK_ROWS = 1 << 16


class KeySource(Protocol):
    """Keys in the order of their numbers."""

    @property
    def dim(self) -> int:
        """Width of a key."""
        ...

    def __len__(self) -> int:
        """How many keys there are."""
        ...

    def blocks(self, rows: int, /) -> Iterable[tuple[int, Tensor]]:
        """All keys in order: (number of the first, ``(up to rows, dim)``), in the stored dtype."""
        ...

    def gather(self, ids: Tensor, /) -> Tensor:
        """Keys of ``ids`` (int64, any shape), with ``dim`` appended to the shape."""
        ...


class TensorKeys:
    """A tensor ``(entries, dim)`` as a source of keys."""

    def __init__(self, keys: Tensor):
        check(
            keys.dim() == 2 and keys.is_floating_point(),
            f"keys must be a floating point tensor (entries, dim), got {tuple(keys.shape)} of "
            f"{keys.dtype}",
        )
        self.keys = keys.detach()
        self.dim = keys.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def blocks(self, rows: int, /) -> Iterator[tuple[int, Tensor]]:
        """Views of ``rows`` keys each."""
        for start in range(0, len(self.keys), rows):
            yield start, self.keys[start : start + rows]

    def gather(self, ids: Tensor, /) -> Tensor:
        """Copies of the keys ``ids``."""
        flat = ids.reshape(-1).to(self.keys.device)
        return self.keys.index_select(0, flat).reshape(*ids.shape, self.dim)


def as_keys(keys: Tensor | KeySource) -> KeySource:
    """A non-empty source of keys.

    Raises:
        InputError: if there is no key.
    """
    source = TensorKeys(keys) if isinstance(keys, Tensor) else keys
    check(len(source) > 0, "an index needs at least one key, got an empty store; extract one first")
    return source


def load_if_it_fits(keys: Tensor | KeySource) -> Tensor | KeySource:
    """A store's keys as one tensor in memory, or the store itself if they need over half of it.

    Args:
        keys: a tensor (returned as it is), or a source; one that has ``load_keys()`` is loaded.
    """
    load = getattr(keys, "load_keys", None)
    if load is None:
        return keys
    width = 4 if "float32" in str(getattr(keys, "dtype", "float32")) else 2
    source = as_keys(keys)
    return load() if 2 * len(source) * source.dim * width <= _memory() else keys


def _memory() -> float:
    """Bytes of memory of this machine, infinite where it cannot be asked."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def held_keys(keys: KeySource, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """A seeded sample of at most ``count`` keys, in order: their ids and the keys as float32."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(len(keys), generator=generator)[:count].sort().values
    return ids, keys.gather(ids).float()


def drop_own(scores: Tensor, ids: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Take every query's own entry out of its k + 1 neighbours, keeping the order.

    Args:
        scores: ``(queries, k + 1)``.
        ids: ``(queries, k + 1)``.
        own: ``(queries,)`` the entry that each query is a copy of.

    Returns:
        ``(queries, k)`` scores and ids; the farthest goes where the own entry was not found.
    """
    keep = ids != own.to(ids.device).unsqueeze(-1)
    keep[keep.all(-1), -1] = False
    shape = (len(ids), ids.shape[1] - 1)
    return scores[keep].view(shape), ids[keep].view(shape)


def sample_keys(keys: KeySource, count: int, metric: str, seed: int) -> NDArray[np.float32]:
    """``(count, dim)`` of the keys, drawn without repetition and prepared, in their own order."""
    ids = np.random.default_rng(seed).choice(len(keys), count, replace=False)
    ids.sort()
    sample = np.empty((count, keys.dim), np.float32)
    for begin in range(0, count, _BLOCK_ROWS):
        part = torch.from_numpy(ids[begin : begin + _BLOCK_ROWS])
        sample[begin : begin + len(part)] = prepare_keys(keys.gather(part), metric)
    return sample
