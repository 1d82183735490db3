"""What TRIME's training memories say about the targets of a batch.

Every position p of a batch has a hidden state g_p, its key, and a target y_p, what its key stands
for. The memory of a query is the set of positions that it may see (Zhong et al. 2022, section 3):

    trime        earlier positions of the same row
    trime_long   earlier positions of the same stream: consecutive rows, also of other processes
    trime_ext    all positions of other rows, past and future, and earlier ones of the own row,
                 unless the own row is hidden

    s_pq = g_p . g_q / (sqrt(dim) temperature)

Gradients flow into queries and keys. Padding (target -100) is no key and asks nothing.

Differs from the paper's code: padding there acts as a memory of its token; a long memory there
needs equally many tokens on every process.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memlm.core.types import Bank, TargetPartial
from memlm.data.batches import IGNORED
from memlm.ops.bank import (
    Places,
    any_of,
    bank_lse,
    earlier_in_document,
    earlier_in_stream,
    other_documents,
)
from memlm.training.objectives.gather import gather_entries, rank_and_size

# Positions, rows and streams of process r are numbered from r * _APART.
_APART = 1 << 40


class Positions(NamedTuple):
    """The positions of a batch, by row.

    Attributes:
        keys: ``(rows, time, dim)`` tap states.
        targets: ``(rows, time)`` int64, -100 where there is none.
    """

    keys: Tensor
    targets: Tensor

    @property
    def scale(self) -> float:
        """``1 / sqrt(dim)``."""
        return 1 / math.sqrt(self.keys.shape[-1])


def local_memory(
    batch: Positions, *, document: Tensor | None = None, temperature: float = 1.0
) -> TargetPartial:
    """Earlier positions of the same row.

    Args:
        batch: the positions.
        document: ``(rows, time)`` int64, keeps the memory inside documents; None: rows are.
        temperature: divides the scores.

    Returns:
        ``(rows, time)``.
    """
    rows, time = batch.targets.shape
    zeros = torch.zeros_like(batch.targets)
    places = Places(
        stream=zeros,
        document=zeros if document is None else document,
        position=torch.arange(time, device=zeros.device).expand(rows, time),
    )
    stream = _hide(places.stream, batch.targets)
    bank = Bank(batch.keys, batch.targets, stream, places.document, places.position)
    return bank_lse(
        batch.keys,
        bank,
        batch.targets,
        places,
        earlier_in_document,
        scale=batch.scale / temperature,
    )


def long_memory(
    batch: Positions,
    *,
    stream: Tensor | None = None,
    position: Tensor | None = None,
    ranks_per_stream: int = 1,
    detach_remote: bool = False,
    temperature: float = 1.0,
) -> TargetPartial:
    """Earlier positions of the same stream, on this and other processes.

    Args:
        batch: the positions.
        stream: ``(rows, time)`` int64, of one numbering on all processes; None: this process and
            its neighbours read one, ``ranks_per_stream`` processes in all.
        position: ``(rows, time)`` int64, increasing with time in a stream; None: rows in order,
            processes in order.
        ranks_per_stream: see ``stream``.
        detach_remote: keys of other processes are constants.
        temperature: divides the scores.

    Returns:
        ``(rows, time)``.
    """
    rank, size = rank_and_size()
    own = rank // ranks_per_stream
    nearby = range(size)
    if stream is None:
        stream = torch.full_like(batch.targets, own)
        nearby = range(own * ranks_per_stream, min((own + 1) * ranks_per_stream, size))
    if position is None:
        position = numbered(batch.targets.numel(), batch.targets).view_as(batch.targets)
    places = Places(stream, stream, position)
    return _gathered(batch, places, earlier_in_stream, nearby, detach_remote, temperature)


def external_memory(
    batch: Positions,
    *,
    hide_own: bool = False,
    detach_remote: bool = False,
    temperature: float = 1.0,
) -> TargetPartial:
    """All positions of other rows, on this and other processes, and earlier ones of the own row.

    Args:
        batch: the positions.
        hide_own: leave out the own row.
        detach_remote: keys of other processes are constants.
        temperature: divides the scores.

    Returns:
        ``(rows, time)``.
    """
    rows, time = batch.targets.shape
    row = numbered(rows, batch.targets)[:, None].expand(rows, time)
    position = torch.arange(time, device=row.device).expand(rows, time)
    places = Places(torch.zeros_like(row), row, position)
    rule = other_documents if hide_own else any_of(other_documents, earlier_in_document)
    everybody = range(rank_and_size()[1])
    return _gathered(batch, places, rule, everybody, detach_remote, temperature)


def _gathered(
    batch: Positions, places: Places, rule, nearby: range, detach_remote: bool, temperature: float
) -> TargetPartial:
    """The partial of the flattened batch against the keys of the processes ``nearby``."""
    query, targets = batch.keys.flatten(0, 1), batch.targets.flatten()
    places = Places(*(field.flatten() for field in places))
    hidden = places._replace(stream=_hide(places.stream, targets))
    fields = torch.stack([targets, *hidden], dim=1)
    parts = gather_entries(query, fields, detach_remote=detach_remote)
    keys, columns = zip(*(parts[process] for process in nearby), strict=True)
    tokens, *rest = torch.cat(columns).unbind(1)
    bank = Bank(torch.cat(keys), tokens, *rest)
    partial = bank_lse(query, bank, targets, places, rule, scale=batch.scale / temperature)
    return TargetPartial(*(part.view_as(batch.targets) for part in partial))


def _hide(stream: Tensor, targets: Tensor) -> Tensor:
    """Padding stands in no stream."""
    return torch.where(targets == IGNORED, -1, stream)


def numbered(count: int, like: Tensor) -> Tensor:
    """``(count,)`` int64 numbers that no other process uses, ascending with the processes."""
    return rank_and_size()[0] * _APART + torch.arange(count, device=like.device)
