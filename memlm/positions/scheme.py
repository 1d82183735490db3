"""Position schemes of an encoder, as one switch: the rows of the table in TUPE (Ke et al. 2021).

With s = (terms * head width)^-1/2, the scores of a layer are

    bert-a          s (x_i + p_i) W_Q . (x_j + p_j) W_K                    terms 1
    bert-r          the same + b_{j-i}                                     terms 1
    bert-a-d        s (x_i W_Q + p_i U_Q) . (x_j W_K + p_j U_K)            terms 4
    tupe-a          s (x_i W_Q . x_j W_K + p_i U_Q . p_j U_K), with reset  terms 2
    tupe-r          the same + b_{j-i}                                     terms 2
    tupe-a-tie-cls  as tupe-a, without reset                               terms 2

``reset`` cuts the untied tokens ([CLS]) loose: they see no positions, and everyone sees them
through one learned number per head. The bucket term is neither scaled nor counted in ``terms``.
Torch-free.
"""

from dataclasses import dataclass
from typing import Literal

from memlm.core.config import Config, check
from memlm.core.errors import InputError

Absolute = Literal["none", "added", "crossed", "untied"]
SchemeName = Literal["bert-a", "bert-r", "bert-a-d", "tupe-a", "tupe-r", "tupe-a-tie-cls"]


@dataclass(frozen=True)
class PositionScheme(Config):
    """Which position terms an attention has.

    Attributes:
        absolute: ``"added"`` to the token embeddings; ``"crossed"`` with the content, in every
            layer; ``"untied"`` from it, a term of its own; ``"none"``.
        relative: the bucketed bias of T5, one number per head and bucket.
        reset: untied tokens ([CLS]) see and show no positions.
    """

    absolute: Absolute = "untied"
    relative: bool = False
    reset: bool = True

    def __post_init__(self) -> None:
        check(
            self.absolute in ("none", "added", "crossed", "untied"),
            f"absolute must be 'none', 'added', 'crossed' or 'untied', got {self.absolute!r}",
        )
        check(
            not self.reset or self.absolute in ("untied", "none"),
            f"reset must go with absolute 'untied' or 'none', got {self.absolute!r}: there the "
            "position is part of the content and cannot be taken out",
        )

    @property
    def terms(self) -> int:
        """How many dot products a score sums: scores are scaled by (terms * head width)^-1/2."""
        return {"none": 1, "added": 1, "crossed": 4, "untied": 2}[self.absolute]

    @classmethod
    def named(cls, name: str) -> "PositionScheme":
        """One of the six schemes of the paper's table.

        Raises:
            InputError: for another name.
        """
        if name not in SCHEMES:
            raise InputError(f"scheme must be one of {', '.join(SCHEMES)}, got {name!r}")
        return SCHEMES[name]

    @property
    def name(self) -> str:
        """The paper's name, or a description where the paper has none."""
        for name, scheme in SCHEMES.items():
            if scheme == self:
                return name
        relative, reset = "+buckets" if self.relative else "", "+reset" if self.reset else ""
        return f"{self.absolute}{relative}{reset}"


SCHEMES: dict[str, PositionScheme] = {
    "bert-a": PositionScheme("added", relative=False, reset=False),
    "bert-r": PositionScheme("added", relative=True, reset=False),
    "bert-a-d": PositionScheme("crossed", relative=False, reset=False),
    "tupe-a": PositionScheme("untied", relative=False, reset=True),
    "tupe-r": PositionScheme("untied", relative=True, reset=True),
    "tupe-a-tie-cls": PositionScheme("untied", relative=False, reset=False),
}
