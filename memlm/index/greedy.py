"""Greedy merge: entries that say the same in the same place become one, with a weight.

An entry absorbs those of its nearest neighbours that propose the same next token (He et al. 2021,
"Efficient Nearest Neighbor Language Models", section 4.3):

    visit the entries in a seeded order; each that is still there absorbs, among its k + 1 nearest,
    every other entry with its value that has neither been absorbed nor absorbed any

The survivors with their weights are a smaller store (`memlm.store.prune`); who absorbed whom is a
partition of the full one, so the same pass also makes clusters for an automaton (Alon et al. 2022,
section 6: a star per survivor).

Differs from the papers' code: it keeps who absorbed whom, takes any seed, and drops neighbours that
a search did not find (-1 reads the last entry there).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.progress import bar
from memlm.core.types import Index
from memlm.index.keys import KeySource
from memlm.index.partition import Clusters

_BLOCK_ROWS = 1 << 12


class Merge(NamedTuple):
    """Who absorbed whom.

    Attributes:
        parent: ``(entries,)`` int64, the entry that absorbed each; survivors are their own.
        weights: ``(entries,)`` int64, entries that each stands for; 0 where it was absorbed.
    """

    parent: Tensor
    weights: Tensor

    @property
    def survivors(self) -> Tensor:
        """``(survivors,)`` int64, in order."""
        return self.weights.nonzero().squeeze(-1)

    def clusters(self, **known: str) -> Clusters:
        """The merge as clusters of the full store; a survivor that absorbed nothing is in none.

        Args:
            known: fields of `ClusterRecord`, e.g. ``store_fingerprint``.
        """
        absorbing = self.weights > 1
        number = absorbing.cumsum(0) - 1
        cluster_of = torch.where(absorbing[self.parent], number[self.parent], -1)
        return Clusters.from_assignment(cluster_of, int(absorbing.sum()), **known)


def nearest_entries(index: Index, keys: KeySource, k: int, *, quiet: bool = False) -> Tensor:
    """The neighbours of every entry, itself usually first.

    Args:
        index: of ``keys``.
        keys: of a store.
        k: neighbours.
        quiet: show no progress bar.

    Returns:
        ``(entries, k)`` int32 (int64 for huge stores), -1 where fewer were found.
    """
    dtype = torch.int32 if len(keys) <= torch.iinfo(torch.int32).max else torch.int64
    found = torch.empty(len(keys), k, dtype=dtype)
    with bar(len(keys), label="neighbours", unit="key", quiet=quiet) as progress:
        for start, block in keys.blocks(_BLOCK_ROWS):
            found[start : start + len(block)] = index.search(block.float(), k).ids
            progress.update(len(block))
    return found


def greedy_merge(
    values: Tensor, neighbours: Tensor, k: int, *, order: Tensor | None = None, seed: int = 1
) -> Merge:
    """Let entries absorb their neighbours with the same value.

    Args:
        values: ``(entries,)`` integers, the token after each key.
        neighbours: ``(entries, at least k + 1)`` nearest entries, -1 for none.
        k: neighbours that may be absorbed; one column more is looked at, as an entry is usually
            its own nearest.
        order: ``(entries,)`` in which entries are visited; None: drawn with ``seed``.
        seed: of the order.

    Raises:
        InputError: if the shapes do not fit, or the order is no permutation.
    """
    count = len(values)
    check(k >= 1, f"k must be at least 1, got {k}")
    check(
        neighbours.dim() == 2 and len(neighbours) == count and neighbours.shape[1] > k,
        f"neighbours must be ({count}, {k + 1} or more) to merge {k} of them, got "
        f"{tuple(neighbours.shape)}; search for more",
    )
    if order is None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    check(
        order.shape == (count,) and torch.equal(order.sort().values, torch.arange(count)),
        f"order must name each of the {count} entries once, got {tuple(order.shape)}",
    )
    near = neighbours[:, : k + 1].long()
    same = (near >= 0) & (values[near.clamp(min=0)] == values.unsqueeze(1))
    same &= near != torch.arange(count).unsqueeze(1)
    # Only pairs that may merge are walked one by one: each decision depends on all before it.
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count)
    row, column = same.nonzero(as_tuple=True)
    first = torch.argsort(rank[row], stable=True)
    pairs = zip(row[first].tolist(), near[row, column][first].tolist(), strict=True)
    parent, weights = list(range(count)), [1] * count
    for survivor, other in pairs:
        if weights[survivor] > 0 and weights[other] == 1:
            weights[other] = 0
            weights[survivor] += 1
            parent[other] = survivor
    return Merge(torch.tensor(parent), torch.tensor(weights))
