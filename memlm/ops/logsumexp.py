"""Log-sum-exp that is safe on empty sets: log 0 is -inf, and its gradient is zero, not NaN.

An empty memory has ``lse = -inf``. ``torch.logaddexp(-inf, -inf)`` returns -inf but a NaN
gradient, which would poison every parameter of the model; here the row simply carries none.
"""

import torch
from torch import Tensor


def safe_logsumexp(x: Tensor, dim: int = -1) -> Tensor:
    """``log sum_j exp(x_j)`` along ``dim``; all -inf gives -inf with zero gradient.

    Args:
        x: any shape, floating point, entries finite or -inf; the dimension may be empty.
        dim: the dimension that is summed away.
    """
    shift = finite_max(x, dim)
    total = torch.exp(x - shift).sum(dim)
    return safe_log(total) + shift.squeeze(dim)


def finite_max(x: Tensor, dim: int = -1) -> Tensor:
    """The largest entry along ``dim`` (kept, detached): what to subtract before ``exp``.

    Zero where there is no finite entry, so that ``x - finite_max(x)`` is never NaN.
    """
    if x.shape[dim] == 0:
        return x.detach().sum(dim, keepdim=True)
    largest = x.detach().amax(dim, keepdim=True)
    return torch.where(torch.isinf(largest), torch.zeros_like(largest), largest)


def safe_logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """``log(exp(a) + exp(b))`` elementwise; two -inf give -inf with zero gradient."""
    a, b = torch.broadcast_tensors(a, b)
    return safe_logsumexp(torch.stack((a, b)), dim=0)


def safe_log(x: Tensor) -> Tensor:
    """``log x`` for ``x >= 0``; zero gives -inf with zero gradient."""
    empty = x == 0
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, torch.ones_like(x), x)))
