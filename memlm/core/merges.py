"""How a memory joins a model: the settings of the two merges (the maths is in `ops.merge`)."""

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


Merge = Union | Mixture


def merge_from_dict(values: dict) -> Merge:
    """The merge that ``to_dict`` wrote."""
    return Union.from_dict(values) if values.get("kind") == "Union" else Mixture.from_dict(values)
