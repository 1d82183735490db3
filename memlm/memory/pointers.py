"""Pointers of many sequences at once: rows of entry numbers, padded with -1.

RetoMaton (Alon et al. 2022, section 3) keeps, per sequence, the entries of a store that agreed with
the token that came, and goes on at the entries that follow them in the text. The published code
walks such lists entry by entry in Python. Here a batch of sequences is one matrix ``(rows, width)``
and every step a few operations on it:

    follow     keep the entries that proposed the token, best first, and step to their successors
    members    the entries that share a cluster with a pointer, most hit clusters first
    contains   which numbers of a row are among the pointers of that row

Nothing here knows keys, distances or tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.index.partition import Clusters


class ClusterTable(NamedTuple):
    """Clusters as the step looks them up, on one device.

    Attributes:
        cluster_of: ``(entries,)`` cluster of an entry, -1 for none.
        begin: ``(clusters + 1,)`` int64, where members begin; one more row, empty, stands for none.
        size: ``(clusters + 1,)`` int64, number of members; the last is 0.
        members: ``(assigned,)`` entries, cluster after cluster.
    """

    cluster_of: Tensor
    begin: Tensor
    size: Tensor
    members: Tensor


def cluster_table(clusters: Clusters, device: torch.device) -> ClusterTable:
    """The clusters on ``device``, with a last, empty cluster for entries that are in none."""
    size = torch.nn.functional.pad(clusters.offsets.diff(), (0, 1))
    return ClusterTable(
        clusters.cluster_of.to(device),
        clusters.offsets.to(device),
        size.to(device),
        clusters.members.to(device),
    )


def next_entries(
    entries: int, documents: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """The successor of every entry: the next one, unless the text breaks off between them.

    Args:
        entries: how many.
        documents: ``(entries,)`` document of each; a successor is of the same one. None: all are.
        positions: ``(entries,)`` place in the document; a successor stands right behind.

    Returns:
        ``(entries,)`` int32 (int64 for huge stores), -1 where there is none.
    """
    dtype = torch.int32 if entries <= torch.iinfo(torch.int32).max else torch.int64
    successors = torch.arange(1, entries + 1, dtype=dtype)
    successors[-1:] = -1
    if documents is not None:
        successors[:-1][documents[1:] != documents[:-1]] = -1
    if positions is not None:
        successors[:-1][positions[1:] != positions[:-1] + 1] = -1
    return successors


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
    row, column = keep.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(keep))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    shape = (len(keep), int(counts.max()) if len(row) else 0)
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
        successors: ``(store entries,)``.

    Returns:
        ``(rows, most kept)`` int64, padded with -1.
    """
    kept, score = compact(keep, entries, scores, fill=(-1, -torch.inf))
    if kept.shape[1] == 0:
        return kept
    order = torch.argsort(score, dim=1, descending=True, stable=True)
    kept = kept.gather(1, order)
    pointers = successors[kept.clamp(min=0)].long()
    return pointers.masked_fill_(kept < 0, -1)


def members(pointers: Tensor, table: ClusterTable, most: int) -> Tensor:
    """The members of all clusters that pointers of a row are in.

    Clusters with more pointers come first, equal ones by number; members in ascending order.

    Args:
        pointers: ``(rows, pointers)`` int64, padded with -1.
        table: the clusters.
        most: members per row, at most.

    Returns:
        ``(rows, up to most)`` int64, padded with -1.
    """
    none = len(table.size) - 1
    rows, width = pointers.shape
    if width == 0 or len(table.members) == 0:
        return pointers.new_empty(rows, 0)
    cluster = table.cluster_of[pointers.clamp(min=0)].long()
    cluster = cluster.masked_fill_((pointers < 0) | (cluster < 0), none).sort(dim=1).values
    # Equal neighbours are one cluster: number the clusters of a row, and count their pointers.
    first = torch.ones_like(cluster, dtype=torch.bool)
    first[:, 1:] = cluster[:, 1:] != cluster[:, :-1]
    rank = first.cumsum(1) - 1
    distinct = torch.full_like(cluster, none).scatter_(1, rank, cluster)
    counts = torch.zeros_like(cluster).scatter_add_(1, rank, (cluster != none).long())
    order = torch.argsort(counts, dim=1, descending=True, stable=True)
    distinct = distinct.gather(1, order)
    # Laid end to end, column j of a row is member j - start of the cluster that ends behind j.
    size = table.size[distinct]
    end = size.cumsum(1)
    columns = min(int(end[:, -1].max()), most)
    column = torch.arange(columns, device=pointers.device).expand(rows, columns).contiguous()
    which = torch.searchsorted(end, column, right=True)
    outside = which >= width
    which = which.clamp_(max=width - 1)
    place = (table.begin[distinct] - end + size).gather(1, which) + column
    place = place.masked_fill_(outside, 0)
    return table.members[place].long().masked_fill_(outside, -1)


def contains(pool: Tensor, values: Tensor) -> Tensor:
    """Which ``values`` ``(rows, n)`` are in their row of ``pool`` ``(rows, m)``; -1 never is."""
    if pool.shape[1] == 0 or values.shape[1] == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    pool = pool.sort(dim=1).values
    place = torch.searchsorted(pool, values.contiguous()).clamp_(max=pool.shape[1] - 1)
    return (pool.gather(1, place) == values) & (values >= 0)


def first_copies(entries: Tensor) -> Tensor:
    """Which columns of ``(rows, width)`` hold a number for the first time; -1 never counts."""
    ordered, order = entries.sort(dim=1, stable=True)
    again = torch.zeros_like(entries, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    repeated = torch.zeros_like(again).scatter_(1, order, again)
    return ~repeated & (entries >= 0)
