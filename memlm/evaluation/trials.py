"""Trying settings of a memory on kept statistics, and learning the gate between it and the model.

    said    = union( past(size, T), neighbours(k, T) )            what the memory says
    merged  = merge( model, said )                                mixture, union or gate
    trial   = merged, or (1 - l) merged + l neighbours(k, T')     the store once more

The gate's two numbers lower the mean loss by gradient (L-BFGS), starting from the union and from
the best mixture: with enough tokens it is at least as good as both *on this text*.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memlm.core.config import Config, check
from memlm.core.merges import Gate, Merge, Mixture, Union
from memlm.core.types import TargetPartial
from memlm.evaluation.statistics import Statistics
from memlm.ops.logsumexp import safe_logsumexp
from memlm.ops.merge import gate, merge_target, mixture, union

MERGES = ("mixture", "union", "gate")
_CHUNK = 1 << 22  # neighbours whose weights are computed at once
_STEPS = 60  # of the search for a gate


@dataclass(frozen=True)
class Grid(Config):
    """Which settings to try: all combinations.

    Attributes:
        merges: of "mixture", "union" and "gate".
        lams: weights of a mixture, between 0 and 1.
        temperatures: above 0, for all members of a memory; none: from the scores of the pass.
        ks: numbers of neighbours; none: from what the pass found.
        sizes: of the long-term memory.
        interpolations: (lam, temperature) of the neighbours once more, beside not to.
    """

    merges: tuple[str, ...] = ("mixture",)
    lams: tuple[float, ...] = (0.25,)
    temperatures: tuple[float, ...] = ()
    ks: tuple[int, ...] = ()
    sizes: tuple[int, ...] = (0,)
    interpolations: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        check(len(self.merges) > 0, "the grid must have at least one merge, got none")
        for name in self.merges:
            check(name in MERGES, f"a merge must be one of {', '.join(MERGES)}, got {name!r}")
        check(len(self.lams) > 0, "the grid must have at least one lam, got none")
        check(len(self.sizes) > 0, "the grid must have at least one size, got none")
        for lam in (*self.lams, *(lam for lam, _ in self.interpolations)):
            check(
                0 < lam < 1, f"every lam to try must lie between 0 and 1, both excluded, got {lam}"
            )
        for value in (*self.temperatures, *(value for _, value in self.interpolations)):
            check(value > 0, f"every temperature to try must be above 0, got {value}")
        for size in self.sizes:
            check(size >= 0, f"every size to try must not be negative, got {size}")


@dataclass(frozen=True)
class Trial(Config):
    """One setting and what it gave.

    Attributes:
        lam: weight of the memory in a mixture; None in a union or gate.
        temperature: divisor of the scores.
        k: neighbours used; 0 without a store.
        perplexity: token-weighted.
        size: of the long-term memory; 0 without one.
        slope: of a gate, else None.
        bias: of a gate, else None.
        flat: (lam, temperature) at which the neighbours are mixed in once more, or None.
    """

    lam: float | None
    temperature: float
    k: int
    perplexity: float
    size: int = 0
    slope: float | None = None
    bias: float | None = None
    flat: tuple[float, float] | None = None

    @property
    def merge(self) -> Merge:
        """How the memory joins the model."""
        if self.slope is not None and self.bias is not None:
            return Gate(self.slope, self.bias)
        return Union() if self.lam is None else Mixture(self.lam)

    def describe(self) -> str:
        """``"lam=0.25 temperature=10 k=64"``; what does not apply is left out."""
        words = ["union"] if self.lam is None and self.slope is None else []
        for name in ("lam", "slope", "bias", "temperature"):
            value = getattr(self, name)
            words += [] if value is None else [f"{name}={value:.4g}"]
        words += [f"{name}={getattr(self, name)}" for name in ("k", "size") if getattr(self, name)]
        if self.flat is not None:
            words.append(f"interpolated lam={self.flat[0]:g} temperature={self.flat[1]:g}")
        return " ".join(words)


def search_grid(kept: Statistics, grid: Grid, *, device: torch.device | str = "cpu") -> list[Trial]:
    """The perplexity of every setting, ordered by k, temperature, size, merge, interpolation.

    Args:
        kept: from one pass, with the sizes and temperatures of the grid.
        grid: its temperatures and ks are given; a k of 0 is no store.
        device: where to compute.
    """
    base = TargetPartial(*(half.to(device) for half in kept.base))
    trials = []
    for k in grid.ks:
        flats = {flat: neighbours(kept, k, flat[1], device) for flat in grid.interpolations}
        for column, temperature in enumerate(grid.temperatures):
            near = neighbours(kept, k, temperature, device)
            for row, size in enumerate(grid.sizes):
                said = _said(kept, near, row, column, device)
                for merge in _merges(grid, base, said):
                    merged = merge_target(merge, base, said)
                    make = partial(_trial, merge, temperature=temperature, k=k, size=size)
                    trials.append(make(merged, flat=None))
                    trials += [
                        make(mixture(flat[0], merged, again), flat=flat)
                        for flat, again in flats.items()
                    ]
    return trials


def neighbours(
    kept: Statistics, k: int, temperature: float, device: torch.device | str
) -> TargetPartial:
    """What the k nearest say at a temperature, ``(tokens,)``; nothing for a k of 0."""
    rows = max(1, _CHUNK // max(k, 1))
    lse, target_lse = [], []
    for start in range(0, len(kept.scores), rows):
        here = slice(start, start + rows)
        scores = kept.scores[here, :k].to(device) / temperature
        if kept.weights.shape[1]:
            scores = scores + kept.weights[here, :k].to(device)
        matches = kept.matches[here, :k].to(device)
        lse.append(safe_logsumexp(scores))
        target_lse.append(safe_logsumexp(scores.masked_fill(~matches, -torch.inf)))
    return TargetPartial(torch.cat(lse), torch.cat(target_lse))


def fit_gate(base: TargetPartial, said: TargetPartial, start: Gate) -> tuple[Gate, float]:
    """The gate with the lowest mean loss near a start, and that loss.

    Args:
        base: ``(tokens,)`` the model's partial.
        said: ``(tokens,)`` the memory's.
        start: where to begin.
    """
    # what inference mode made cannot be differentiated; copies made outside of it can
    with torch.inference_mode(False), torch.enable_grad():
        base, said = (
            TargetPartial(*(half.clone().double() for half in side)) for side in (base, said)
        )
        numbers = base.lse.new_tensor([start.slope, start.bias]).requires_grad_()
        search = torch.optim.LBFGS([numbers], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            merged = gate(numbers[0], numbers[1], base, said)
            value = (merged.lse - merged.target_lse).mean()
            if value.requires_grad:
                value.backward()
            return value.detach()

        search.step(loss)  # type: ignore[arg-type]  # torch's own type says float
        found, (slope, bias) = float(loss()), numbers.tolist()
    before = _mean_loss(merge_target(start, base, said))
    if not math.isfinite(found) or found > before:
        return start, before
    return Gate(slope, bias), found


def _merges(grid: Grid, base: TargetPartial, said: TargetPartial) -> Iterator[Merge]:
    if "mixture" in grid.merges:
        yield from (Mixture(lam) for lam in grid.lams)
    if "union" in grid.merges:
        yield Union()
    if "gate" in grid.merges:
        lam = min(grid.lams, key=lambda lam: _mean_loss(mixture(lam, base, said)))
        starts = (Gate(), Gate(0.0, math.log(lam / (1 - lam))))
        yield min((fit_gate(base, said, start) for start in starts), key=lambda fit: fit[1])[0]


def _said(
    kept: Statistics, near: TargetPartial, row: int, column: int, device: torch.device | str
) -> TargetPartial:
    """The union of what was read before and the neighbours."""
    if kept.past.lse.shape[1] == 0:
        return near
    past = TargetPartial(*(half[:, row, column].to(device) for half in kept.past))
    return union(past, near)


def _trial(merge: Merge, merged: TargetPartial, *, temperature, k, size, flat) -> Trial:
    return Trial(
        lam=getattr(merge, "lam", None),
        temperature=temperature,
        k=k,
        perplexity=math.exp(_mean_loss(merged)),
        size=size,
        slope=getattr(merge, "slope", None),
        bias=getattr(merge, "bias", None),
        flat=flat,
    )


def _mean_loss(merged: TargetPartial) -> float:
    return float((merged.lse.double() - merged.target_lse.double()).mean())
