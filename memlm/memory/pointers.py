"""Pointers of many sequences at once: rows of entry numbers, padded with -1.

RetoMaton (Alon et al. 2022, section 3) keeps, per sequence, the entries of a store that agreed with
the token that came, and goes on at the entries that follow them in the text. The published code
walks such lists entry by entry in Python. Here a batch of sequences is one matrix ``(rows, width)``
and every step a few operations on it:

    follow       keep the entries that proposed the token, best first, and step to their successors
    members      the entries that share a cluster with a pointer, most hit clusters first
    contains     which numbers of a row are among the pointers of that row
    pair_scores  how near each key is to its own query

Looking something up for every entry of a row is one indexing operation, padding included: a table
has one more place at its end, which is where -1 leads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.index.partition import Clusters
from memlm.memory.scores import similarity


class ClusterTable(NamedTuple):
    """Clusters as the step looks them up; one more cluster, empty, stands for none.

    Attributes:
        cluster_of: ``(entries + 1,)`` cluster of an entry.
        begin: ``(clusters + 1,)`` int64, where members begin.
        size: ``(clusters + 1,)`` int64, number of members.
        members: ``(assigned + 1,)`` entries, cluster after cluster, and -1.
    """

    cluster_of: Tensor
    begin: Tensor
    size: Tensor
    members: Tensor


def cluster_table(clusters: Clusters, device: torch.device) -> ClusterTable:
    """The clusters on ``device``."""
    cluster_of = table(clusters.cluster_of, device)
    return ClusterTable(
        cluster_of.masked_fill_(cluster_of < 0, len(clusters)),
        clusters.offsets.to(device),
        torch.nn.functional.pad(clusters.offsets.diff(), (0, 1)).to(device),
        table(clusters.members, device),
    )


def table(values: Tensor, device: torch.device) -> Tensor:
    """A copy of ``values`` on ``device`` with -1 behind the last, where the number -1 leads."""
    return torch.nn.functional.pad(values, (0, 1), value=-1).to(device)


def check_successors(successors: Tensor, entries: int) -> Tensor:
    """``successors`` if they point into the store.

    Raises:
        InputError: unless there is one integer per entry between -1 and ``entries - 1``.
    """
    whole = successors.shape == (entries,) and not successors.is_floating_point()
    check(
        whole and int(successors.min()) >= -1 and int(successors.max()) < entries,
        f"successors must be one entry number below {entries}, or -1, for each of {entries} "
        f"entries, got {tuple(successors.shape)} of {successors.dtype}",
    )
    return successors


def compact(keep: Tensor, *values: Tensor, fill: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Move what is kept to the left of each row, in order; as wide as the fullest row.

    Args:
        keep: ``(rows, width)`` bool.
        values: each ``(rows, width)``.
        fill: what to pad each of ``values`` with.
    """
    rows, width = keep.shape
    if width == 0:
        return values
    place = keep.cumsum(1)
    shape = (rows, int(place[:, -1].max()))
    row, column = keep.nonzero(as_tuple=True)
    place = place[row, column] - 1
    packed = []
    for value, empty in zip(values, fill, strict=True):
        out = value.new_full(shape, empty)
        out[row, place] = value[row, column]
        packed.append(out)
    return tuple(packed)


def follow(entries: Tensor, scores: Tensor, keep: Tensor, successors: Tensor) -> Tensor:
    """Successors of the entries to keep, best first.

    Args:
        entries: ``(rows, width)`` int64.
        scores: ``(rows, width)``; the higher the better, ties in order.
        keep: ``(rows, width)`` bool, false where an entry has no successor.
        successors: ``(store entries + 1,)``, a `table`.

    Returns:
        ``(rows, most kept)`` int64, padded with -1.
    """
    kept, score = compact(keep, entries, scores, fill=(-1, -torch.inf))
    if kept.shape[1] == 0:
        return kept
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    return successors[kept.gather(1, order)].long()


def members(pointers: Tensor, clusters: ClusterTable, most: int) -> Tensor:
    """The members of all clusters that pointers of a row are in.

    Clusters with more pointers come first, equal ones by number; members in ascending order.

    Args:
        pointers: ``(rows, pointers)`` int64, padded with -1.
        clusters: of the store.
        most: members per row, at most.

    Returns:
        ``(rows, up to most)`` int64, padded with -1.
    """
    rows, width = pointers.shape
    if width == 0:
        return pointers
    cluster = clusters.cluster_of[pointers].long().sort(dim=1).values
    # Equal neighbours are one cluster: number the clusters of a row, and count their pointers.
    changed = cluster[:, 1:] != cluster[:, :-1]
    rank = torch.nn.functional.pad(changed, (1, 0)).cumsum(1)
    none = len(clusters.size) - 1
    distinct = torch.full_like(cluster, none).scatter_(1, rank, cluster)
    counts = torch.zeros_like(cluster).scatter_add_(1, rank, torch.ones_like(rank))
    order = torch.argsort(counts, dim=1, descending=True, stable=True)
    distinct = distinct.gather(1, order)
    # Laid end to end, column j of a row is in the first cluster that ends behind j.
    size = clusters.size[distinct]
    end = size.cumsum(1)
    columns = min(int(end[:, -1].max()), most)
    column = torch.arange(columns, device=pointers.device).expand(rows, -1).contiguous()
    which = torch.searchsorted(end, column, right=True).clamp_(max=width - 1)
    place = (clusters.begin[distinct] + size - end).gather(1, which) + column
    return clusters.members[place.masked_fill_(column >= end[:, -1:], -1)].long()


def contains(pool: Tensor, values: Tensor) -> Tensor:
    """Which ``values`` ``(rows, n)`` are in their row of ``pool`` ``(rows, m)``; -1 may be, too."""
    if pool.shape[1] == 0 or values.shape[1] == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    pool = pool.sort(dim=1).values
    place = torch.searchsorted(pool, values.contiguous()).clamp_(max=pool.shape[1] - 1)
    return pool.gather(1, place) == values


def first_copies(entries: Tensor) -> Tensor:
    """Which columns of ``(rows, width)`` hold a number for the first time; -1 never counts."""
    ordered, order = entries.sort(dim=1, stable=True)
    again = torch.zeros_like(entries, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = torch.zeros_like(again).scatter_(1, order, again)
    return ~repeated & (entries >= 0)


def pair_scores(queries: Tensor, keys: Tensor, metric: str) -> Tensor:
    """How near each key is to its own query, in difference form; higher is nearer.

    Args:
        queries: ``(pairs, dim)``, or ``(1, dim)`` for all.
        keys: ``(pairs, dim)`` of the same dtype; overwritten.
        metric: "l2" (minus the squared distance), "ip" or "cosine".

    Returns:
        ``(pairs,)``.
    """
    if metric == "l2":
        return torch.linalg.vector_norm(keys.sub_(queries), dim=-1).square_().neg_()
    return similarity(queries.expand_as(keys), keys.unsqueeze(1), metric).squeeze(1)
