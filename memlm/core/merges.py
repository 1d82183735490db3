"""How a memory joins a model: the settings of the merges (the maths is in `ops.merge`)."""

import math
from dataclasses import dataclass

from memlm.core.config import Config, check


@dataclass(frozen=True)
class Union(Config):
    """One softmax over the model's vocabulary and the memory's candidates (TRIME, eq. 4)."""


@dataclass(frozen=True)
class Mixture(Config):
    """``(1 - lam) p_model + lam p_memory`` (kNN-LM, eq. 3).

    Attributes:
        lam: weight of the memory, from 0 (the model alone) to 1 (the memory alone). The papers
            use 0.25 for text like the store's, up to 0.9 for a model far from the store's domain.
    """

    lam: float = 0.25

    def __post_init__(self):
        check(0 <= self.lam <= 1, f"lam must lie between 0 and 1, got {self.lam}")


@dataclass(frozen=True)
class Gate(Config):
    """A mixture whose weight follows how sure the two are, token by token.

    ``lam = sigmoid(slope * (lse_memory - lse_model) + bias)``, with the log of the mass that each
    claims. ``Gate(1, 0)`` is `Union`, ``Gate(0, log(lam / (1 - lam)))`` is ``Mixture(lam)``; what
    lies between and beyond is learnt from held-out text (`memlm.evaluation.tune.tune`).

    Attributes:
        slope: how much the mass counts.
        bias: log-odds of the memory where both claim the same.
    """

    slope: float = 1.0
    bias: float = 0.0

    def __post_init__(self):
        for name in ("slope", "bias"):
            value = getattr(self, name)
            check(math.isfinite(value), f"{name} must be a finite number, got {value}")


@dataclass(frozen=True)
class Shares(Config):
    """Several memories, each with a weight of its own: ``(1 - sum lam_i) p_model + sum lam_i p_i``.

    The weights belong to the memory, a `memlm.memory.together.Together` with ``lams``: what it says
    of a token is the logarithm of ``sum lam_i p_i`` already.
    """


Merge = Union | Mixture | Gate | Shares


def merge_from_dict(values: dict) -> Merge:
    """The merge that ``to_dict`` wrote."""
    kinds = {"Union": Union, "Gate": Gate, "Shares": Shares}
    return kinds.get(values.get("kind", ""), Mixture).from_dict(values)
