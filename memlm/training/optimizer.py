"""Muon for the matrices inside the model, AdamW for the rest, as one optimiser.

Muon (Jordan et al. 2024) replaces the momentum of a weight *matrix* by the nearest orthogonal
matrix (a few Newton-Schulz iterations), so every direction moves at the same speed; small runs
learn more from the same number of tokens than with AdamW alone. Tables and vectors (embedding and
head, norms) are no matrices in this sense and stay with AdamW. The step is scaled to the size of
AdamW's (Liu et al. 2025, section 2.2), so rates of both are of one order.

Both optimisers are torch's own. Here they share one list of groups and one state, so schedules,
checkpoints and ``accelerate`` see a single ordinary optimiser.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


class MuonAdamW(Optimizer):
    """Steps each group with the optimiser it belongs to.

    Args:
        matrices: ``(rows, columns)`` parameters for Muon.
        tables: embeddings and heads for AdamW, decayed.
        vectors: norms and biases for AdamW, not decayed.
        muon_learning_rate: peak rate of the matrices.
        learning_rate: peak rate of the rest.
        weight_decay: of matrices and tables.
        betas: AdamW's.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        tables: list[nn.Parameter],
        vectors: list[nn.Parameter],
        *,
        muon_learning_rate: float,
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        self._muon = Muon(
            [{"params": matrices, "rule": "muon"}],
            lr=muon_learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = AdamW(
            [
                {"params": tables, "weight_decay": weight_decay, "rule": "adamw"},
                {"params": vectors, "weight_decay": 0.0, "rule": "adamw"},
            ],
            lr=learning_rate,
            betas=betas,
            fused=True,
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for rule, optimizer in (("muon", self._muon), ("adamw", self._adamw)):
            # Loading a state dict replaces groups and state: always hand over the present ones.
            optimizer.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            optimizer.state = self.state
            optimizer.step()
        return loss


def muon_adamw(model: nn.Module, head: torch.Tensor, **rates: Any) -> MuonAdamW:
    """Sort a language model's parameters: 2-D weights other than tables go to Muon.

    Args:
        model: whose parameters are trained; the weights of its `nn.Embedding` are tables.
        head: weight of the output embeddings, a table too.
        rates: see `MuonAdamW`.
    """
    looked_up = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    known = {id(table) for table in (head, *looked_up)}
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = [parameter for parameter in wanted if id(parameter) in known]
    vectors = [p for p in wanted if p.ndim != 2 and id(p) not in known]
    matrices = [p for p in wanted if p.ndim == 2 and id(p) not in known]
    return MuonAdamW(matrices, tables, vectors, **rates)
