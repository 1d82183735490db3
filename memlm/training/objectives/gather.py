"""The keys of all processes, with gradient: what makes a memory larger than one device.

Every process holds n_r keys and gets those of all, in the order of the processes. Backward, the
gradient of a key is the *sum* over the processes that used it, so

    sum over processes of loss       is differentiated exactly

as if all rows were on one device. Rows may differ between processes: short ones are filled up, and
what fills them has negative places, which nobody sees (`memlm.ops.bank`).

Differs from TRIME's code: there, keys of other processes are constants (``detach_remote``), though
the paper trains through all memories; and there a filler is recognised by token 0.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.core.processes import rank_and_size


def gather_entries(
    keys: Tensor, fields: Tensor, *, detach_remote: bool
) -> list[tuple[Tensor, Tensor]]:
    """Keys and what belongs to them, of every process.

    Args:
        keys: ``(n, dim)`` of this process; n may differ between processes.
        fields: ``(n, columns)`` int64 beside the keys.
        detach_remote: other processes' keys are constants.

    Returns:
        For every process its keys and fields, filled up to the largest n; fields of fillers are
        -1. This process's own are the given ones, without a copy's detour if it is alone.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [(keys, fields)]
    counts = _all_gather(torch.tensor([len(keys)], device=keys.device))
    missing = int(counts.max()) - len(keys)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, missing))
    fields = torch.nn.functional.pad(fields, (0, 0, 0, missing), value=-1)
    with torch.no_grad():
        all_fields = _all_gather(fields)
    if detach_remote:
        with torch.no_grad():
            all_keys = _all_gather(keys)
        parts = [keys if other == rank else all_keys[other] for other in range(size)]
    else:
        parts = list(_Gather.apply(keys))
    return list(zip(parts, all_fields, strict=True))


def _all_gather(values: Tensor) -> Tensor:
    gathered = values.new_empty(dist.get_world_size(), *values.shape)
    dist.all_gather(list(gathered.unbind(0)), values.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    """``(n, dim)`` of every process; backward adds up what all processes want of one's own."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Gather."""
        return tuple(_all_gather(keys).unbind(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        """Sum over processes, keep one's own."""
        total = torch.stack(grads)
        dist.all_reduce(total)
        return total[dist.get_rank()]
