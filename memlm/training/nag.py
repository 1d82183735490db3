"""Nesterov's accelerated gradient as TRIME's and Baevski and Auli's models are trained with it.

    v  <- m v + g            p <- (1 - rate decay) p - rate (g + m v)

That is ``torch.optim.SGD(nesterov=True)``; only the weight decay is apart from the gradient here
(as in AdamW). fairseq keeps ``-rate v`` instead of v and rescales it whenever the rate changes,
which is the same thing. The recipe: momentum 0.99, gradients clipped to norm 0.1, peak rate 1.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from memlm.core.config import check


class Nag(SGD):
    """Nesterov momentum with decoupled weight decay.

    Args:
        params: parameters or groups.
        lr: rate.
        momentum: m, above 0 and below 1.
        decay: of the weights, per unit of rate.

    Raises:
        InputError: if a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.99,
        decay: float = 0.0,
    ):
        check(0 < momentum < 1, f"momentum must lie between 0 and 1, got {momentum}")
        check(decay >= 0, f"decay must not be negative, got {decay}")
        super().__init__(params, lr=lr, momentum=momentum, nesterov=True)
        for group in self.param_groups:
            group.setdefault("decay", decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["decay"]:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.mul_(1 - group["lr"] * group["decay"])
        super().step()
        return loss
