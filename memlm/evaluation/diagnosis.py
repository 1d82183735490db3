"""What happens to a model's attention beyond the length it was trained on, measured on a text.

Pieces of the text, each behind a begin token, are read by the model as it is. In every layer:

    bound      max over distances up to d of the score of the last query, mean and deviation over
               heads and pieces: flat within the trained length, and rising beyond it where
               distances are new to the model
    entropy    H(n) = - sum_j p_j ln p_j of a query that sees n keys: scores that stay bounded by B
               force H >= ln n - 2 B, so attention gets ever more diffuse
    sinks      share of the attention of queries between half the trained length and all of it that
               goes to the first g tokens, head by head
    features   hidden states of the first tokens and of the rest on two principal components; and
               how far position p lies from the rest:
               separation(p) = |mean of position p - mean of the rest| / rms distance of the rest
                                                                        from their mean

These are the three causes of LM-Infinite (Han et al. 2024, section 3): unseen distances, unseen
numbers of tokens, and first tokens that carry the place where a text begins. What to do about it,
so many sinks and such a window, is measured in `memlm.evaluation.recommend`.

Differs from the paper's scripts: one pass, any family that can be extended, scores with ALiBi and
soft-cap as the softmax gets them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.evaluation.attention_scores import visit_scores
from memlm.evaluation.curves import score_bound

Array = NDArray[np.float64]
_POINTS = 200  # at most so many distances of a curve are kept
_NEAR = 16  # queries at which the shares of first tokens are measured


@dataclass(frozen=True)
class DiagnosisConfig(Config):
    """What is measured.

    Attributes:
        length: tokens of each piece, the begin token included.
        trained: length that the model was trained on.
        pieces: of the text.
        first: tokens at the beginning that are looked at one by one.
        features: positions of every piece whose hidden states are kept.
        points: lengths at which entropy is measured, at most.
    """

    length: int
    trained: int
    pieces: int = 4
    first: int = 10
    features: int = 256
    points: int = 64

    def __post_init__(self) -> None:
        check(
            self.first >= 1 and self.pieces >= 1,
            f"there must be at least one piece and one first token, got {self.pieces} and "
            f"{self.first}",
        )
        check(
            self.trained >= 2 * self.first + 2,
            f"the trained length must exceed twice the {self.first} first tokens by 2, got "
            f"{self.trained}; look at fewer first tokens",
        )
        check(
            self.length >= self.trained,
            f"pieces must have at least the {self.trained} tokens that the model was trained on, "
            f"got {self.length}; give a larger length",
        )
        check(
            self.features > self.first + 1,
            f"hidden states must be kept of more than {self.first + 1} positions, got "
            f"{self.features}",
        )
        check(self.points >= 2, f"entropy needs at least 2 lengths, got {self.points}")


@dataclass(frozen=True)
class Diagnosis:
    """What was found; L layers, H heads.

    Attributes:
        config: what was measured.
        pieces: how many were read.
        distances: ``(D,)`` of ``bound`` and ``bound_deviation``, rising.
        bound: ``(L, D)`` largest score up to a distance, mean over heads and pieces.
        bound_deviation: ``(L, D)`` of the sample.
        lengths: ``(Q,)`` numbers of keys, rising.
        entropy: ``(L, H, Q)`` nats, mean over pieces.
        sinks: ``(L, H, first)`` share of attention on the first 1, 2, ... tokens.
        components: ``(L + 1, pieces, features, 2)`` hidden states before the first layer and behind
            every one, on the two principal components of that place.
        explained: ``(L + 1, 2)`` shares of the variance.
        separation: ``(L + 1, first)`` of each of the first positions.
    """

    config: DiagnosisConfig
    pieces: int
    distances: NDArray[np.int64]
    bound: Array
    bound_deviation: Array
    lengths: NDArray[np.int64]
    entropy: Array
    sinks: Array
    components: Array
    explained: Array
    separation: Array

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; numbers with six digits."""
        arrays = {
            name: _rounded(value) for name, value in vars(self).items() if hasattr(value, "tolist")
        }
        return {
            "config": self.config.to_dict(),
            "pieces": self.pieces,
            "protocol": self.describe(),
            **arrays,
        }

    def describe(self) -> str:
        """One line of protocol."""
        config = self.config
        return (
            f"{self.pieces} pieces of {config.length} tokens behind a begin token, read by the "
            f"model as it is; trained on {config.trained}; scores of the last query, entropy in "
            "nats, shares of queries between half the trained length and all of it"
        )

    def bound_at(self, distance: int) -> Array:
        """``(L,)`` the largest score up to a distance, mean over heads and pieces."""
        return self.bound[:, np.searchsorted(self.distances, distance, side="right") - 1]

    def entropy_at(self, length: int) -> Array:
        """``(L,)`` entropy of queries that see that many keys, or the next smaller number."""
        place = np.searchsorted(self.lengths, length, side="right") - 1
        return self.entropy[:, :, place].mean(1)

    def table(self) -> Group:
        """A row per layer, to print with rich."""
        trained, length, first = self.config.trained, self.config.length, self.config.first
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in (
            "layer",
            f"score to {trained:,}",
            f"to {length:,}",
            f"entropy at {trained:,}",
            f"at {length:,}",
            f"most on first {first}",
            "head",
            "first token apart",
        ):
            table.add_column(name, justify="right")
        bounds = self.bound_at(trained - 1), self.bound_at(length - 1)
        entropies = self.entropy_at(trained), self.entropy_at(length)
        for layer, shares in enumerate(self.sinks[:, :, -1]):
            table.add_row(
                f"{layer}",
                *(f"{values[layer]:.2f}" for values in (*bounds, *entropies)),
                f"{shares.max():.0%}",
                f"{shares.argmax()}",
                f"{self.separation[layer + 1, 0]:.1f}",
            )
        uniform = f"ln {trained:,} = {np.log(trained):.2f}, ln {length:,} = {np.log(length):.2f}"
        return Group(table, Text(f"protocol: {self.describe()}; {uniform}", style="dim"))


def cut_pieces(
    tokens: ArrayLike, length: int, count: int, *, begin_token: int | None = None
) -> Tensor:
    """Pieces of a stream, spread evenly over it.

    Args:
        tokens: one long stream.
        length: tokens of each piece, the begin token included.
        count: of pieces, if they differ; pieces overlap where the stream is short.
        begin_token: stands before each; None: none does.

    Returns:
        ``(pieces, length)`` int64.

    Raises:
        InputError: if the stream is shorter than a piece.
    """
    stream = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    begin = [] if begin_token is None else [begin_token]
    taken = length - len(begin)
    check(
        len(stream) >= taken,
        f"the text must have the {taken} tokens of a piece, got {len(stream)}; give more text or a "
        "smaller length",
    )
    starts = sorted({int(start) for start in np.linspace(0, len(stream) - taken, count)})
    rows = [torch.tensor([*begin, *stream[start : start + taken].tolist()]) for start in starts]
    return torch.stack(rows)


def diagnose(model: PreTrainedModel, pieces: Tensor, config: DiagnosisConfig) -> Diagnosis:
    """Measure one model.

    Args:
        model: causal, of a family that can be extended, not extended; given back as it was.
        pieces: ``(pieces, length)`` int64, from ``cut_pieces``.
        config: what to measure.

    Raises:
        InputError: if the pieces have another length, or too few scores make a deviation.
        UnsupportedModelError: if the model cannot be extended.
    """
    check(
        pieces.ndim == 2 and pieces.shape[1] == config.length,
        f"pieces must be (pieces, {config.length}) tokens, got {tuple(pieces.shape)}",
    )
    places = _places(config)
    watched = [_Watcher(config, places) for _ in range(len(pieces))]
    states = []
    for piece, watcher in zip(pieces, watched, strict=True):
        whole = visit_scores(model, piece[None], places, watcher.visit)
        states.append([state[:, : config.features].double().cpu() for state in whole])
    distances = _spread(config.length, _POINTS) - 1
    layers = range(len(watched[0].last))
    bounds = [
        score_bound([row for one in watched for row in one.last[layer]], longest=config.length)
        for layer in layers
    ]
    lengths = _spread(config.length, config.points)
    features = [_project(config, [row[place] for row in states]) for place in range(len(states[0]))]
    return Diagnosis(
        config=config,
        pieces=len(pieces),
        distances=distances,
        bound=np.stack([bound.mean[distances] for bound in bounds]),
        bound_deviation=np.stack([bound.deviation[distances] for bound in bounds]),
        lengths=lengths,
        entropy=np.mean([np.stack(one.entropy) for one in watched], axis=0),
        sinks=np.mean([np.stack(one.sinks) for one in watched], axis=0),
        components=np.stack([part[0] for part in features]),
        explained=np.stack([part[1] for part in features]),
        separation=np.stack([part[2] for part in features]),
    )


class _Watcher:
    """What is kept of the scores of one piece, layer by layer."""

    def __init__(self, config: DiagnosisConfig, places: Tensor):
        self.config = config
        self.measured = torch.isin(
            places, torch.as_tensor(_spread(config.length, config.points) - 1)
        )
        self.near = torch.isin(places, torch.as_tensor(_near(config)))
        self.last: list[Array] = []  # (heads, keys) of each layer
        self.entropy: list[Array] = []  # (heads, lengths)
        self.sinks: list[Array] = []  # (heads, first)

    def visit(self, layer: int, scores: Tensor) -> None:
        shares = scores[0].double().softmax(-1).cpu()
        entropy = torch.special.entr(shares).sum(-1)
        self.last.append(scores[0, :, -1].double().cpu().numpy())
        self.entropy.append(entropy[:, self.measured].numpy())
        first = shares[:, self.near, : self.config.first].mean(1).cumsum(-1)
        self.sinks.append(first.numpy())


def _places(config: DiagnosisConfig) -> Tensor:
    """Positions of all queries that are looked at, the last one included."""
    return torch.as_tensor(np.union1d(_spread(config.length, config.points) - 1, _near(config)))


def _near(config: DiagnosisConfig) -> NDArray[np.int64]:
    half = config.trained // 2
    return np.unique(np.linspace(half, config.trained - 1, _NEAR).astype(np.int64))


def _spread(longest: int, count: int) -> NDArray[np.int64]:
    """At most so many numbers from 1 to ``longest``, evenly in their logarithm."""
    return np.unique(np.geomspace(1, longest, count).round().astype(np.int64))


def _project(config: DiagnosisConfig, states: list[Tensor]) -> tuple[Array, Array, Array]:
    """Principal components, shares of variance and separation of the first tokens."""
    kept = torch.cat(states)
    flat = kept.flatten(0, 1)
    centred = flat - flat.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    # the sign of an axis is arbitrary: its largest entry is positive
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    components = (centred @ (axes * signs)[:2].T).unflatten(0, kept.shape[:2])
    variance = sizes.square()
    rest = kept[:, config.first :].flatten(0, 1)
    centre = rest.mean(0)
    radius = (rest - centre).square().sum(-1).mean().sqrt()
    apart = (kept[:, : config.first].mean(0) - centre).norm(dim=-1) / radius
    explained = variance[:2] / variance.sum()
    return components.numpy(), explained.numpy(), apart.numpy()


def _rounded(values: NDArray[Any]) -> Any:
    if values.dtype.kind == "i":
        return values.tolist()
    return np.vectorize(lambda x: float(f"{x:.6g}"))(values).tolist()
