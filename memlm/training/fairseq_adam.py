"""Adam as fairseq computes it, which TUPE and RoBERTa were trained with.

    p <- p - rate decay p
    p <- p - rate sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps)

eps is added before v's bias is corrected; ``torch.optim.AdamW`` adds it after. Early in a run that
makes eps 1 / sqrt(1 - b2^t) times greater here (32 times in the first step at b2 = 0.999). Weights
of every kind decay, norms, biases and positions too, unless groups say otherwise.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memlm.core.config import check


class FairseqAdam(Optimizer):
    """Adam with decoupled weight decay and eps before the correction.

    Args:
        params: parameters or groups.
        lr: rate.
        betas: decays of the mean gradient and mean square.
        eps: added to the root of the mean square.
        weight_decay: per unit of rate.

    Raises:
        InputError: if a number is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        check(all(0 <= beta < 1 for beta in betas), f"betas must lie in [0, 1), got {betas}")
        check(eps > 0, f"eps must be above zero, got {eps}")
        check(weight_decay >= 0, f"weight_decay must not be negative, got {weight_decay}")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                state["step"] += 1
                time = state["step"].item()
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].mul_(second).addcmul_(
                    parameter.grad, parameter.grad, value=1 - second
                )
                size = group["lr"] * (1 - second**time) ** 0.5 / (1 - first**time)
                if group["weight_decay"]:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(
                    state["mean"], state["square"].sqrt().add_(group["eps"]), value=-size
                )
        return loss
