"""From settings to what learns: the optimiser, the schedule, the arithmetic.

The rules themselves are in ``optimizer``, ``nag``, ``fairseq_adam``, ``schedule``, ``rates`` and
``polynomial``.
"""

from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.training.config import PLANNED, RunConfig
from memlm.training.fairseq_adam import FairseqAdam
from memlm.training.nag import Nag
from memlm.training.optimizer import muon_adamw
from memlm.training.polynomial import PolynomialRate
from memlm.training.rates import CosineRate, InverseSqrtRate
from memlm.training.schedule import Schedule

_RATES = {"restarts": CosineRate, "inverse_sqrt": InverseSqrtRate, "polynomial": PolynomialRate}
_NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")  # names of torch.cpu.get_capabilities


class PlannedRates(Schedule):
    """A rule for rates as fractions of its peak; keeps plain numbers, which is what is saved.

    Args:
        kind: ``"restarts"``, ``"inverse_sqrt"`` or ``"polynomial"``.
        settings: of `CosineRate`, `InverseSqrtRate` or `PolynomialRate`.
        steps: the last step.
    """

    def __init__(self, kind: str, settings: dict[str, Any], steps: int):
        super().__init__(kind, settings["warmup"], steps)
        self.settings = settings

    def __call__(self, step: int) -> float:
        """The rate of the step after ``step`` finished ones."""
        return _RATES[self.kind](**self.settings)(step) / self.settings["peak"]


def make_schedule(config: RunConfig) -> Schedule:
    """The learning rate by step, as a fraction of the peak."""
    if config.schedule not in PLANNED or config.max_steps is None:
        return Schedule(config.schedule, config.warmup_steps, config.max_steps)
    settings: dict[str, Any] = {"peak": config.learning_rate, "warmup": config.warmup_steps}
    if config.schedule == "polynomial":
        settings["steps"] = config.max_steps
    else:
        settings["start"] = config.start_learning_rate
    if config.schedule == "restarts":
        settings |= {
            "period": config.period or max(1, config.max_steps - config.warmup_steps),
            "low": config.min_learning_rate,
            "growth": config.period_growth,
            "shrink": config.period_shrink,
        }
    schedule = PlannedRates(config.schedule, settings, config.max_steps)
    schedule(0)  # refuses what does not fit together before anything is loaded
    return schedule


def make_optimizer(config: RunConfig, module: nn.Module, model: PreTrainedModel) -> Optimizer:
    """The optimiser of a run; norms, biases and other vectors are not decayed.

    Args:
        config: rule and rates.
        module: whose parameters are trained.
        model: inside ``module``; its head is a table, not a matrix, for Muon.
    """
    if config.optimizer == "muon":
        head = getattr(model.get_output_embeddings(), "weight", None)
        if head is None:
            raise InputError(
                "muon must know the head of a model, but "
                f"{type(model).__name__} shows none; use adamw"
            )
        return muon_adamw(
            module,
            head,
            muon_learning_rate=config.muon_learning_rate,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
        )
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if config.optimizer == "fairseq_adam":
        return FairseqAdam(
            wanted,
            config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
    decayed = [parameter for parameter in wanted if parameter.ndim >= 2]
    others = [parameter for parameter in wanted if parameter.ndim < 2]
    if config.optimizer == "nag":
        groups = [
            {"params": decayed, "decay": config.weight_decay},
            {"params": others, "decay": 0.0},
        ]
        return Nag(groups, lr=config.learning_rate, momentum=config.momentum)
    return AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=not config.sharded,
    )


def resolve_precision(config: RunConfig) -> str:
    """``"float32"``, ``"bfloat16"`` or ``"float16"``: what ``"auto"`` means on this machine.

    Raises:
        InputError: if float16 is wanted without a CUDA device.
    """
    cuda = config.device == "auto" and torch.cuda.is_available()
    check(
        config.precision != "float16" or cuda,
        "float16 must be scaled against underflow, which needs a CUDA device, but there is none; "
        "use bfloat16 or float32",
    )
    if config.precision != "auto":
        return config.precision
    if cuda:
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if any(found.get(name) for name in _NATIVE_BFLOAT16) else "float32"
