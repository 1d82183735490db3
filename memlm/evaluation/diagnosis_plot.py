"""A diagnosis as one picture: a panel for each thing that is measured."""

from typing import Any

import numpy as np

from memlm.evaluation.diagnosis import Diagnosis
from memlm.evaluation.figures import panels
from memlm.evaluation.recommend import Recommendation


def draw_diagnosis(
    found: Diagnosis, recommendation: Recommendation | None = None, *, layer: int | None = None
) -> Any:
    """A figure of matplotlib that shows what was found.

    Args:
        found: from ``diagnose``.
        recommendation: from ``recommend``; None: its panel stays away.
        layer: behind which one features are shown, from 0; None: where the first token lies
            furthest apart.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = panels(5 if recommendation is None else 6, rows=2)
    _curves(axes[0], found.distances, found.bound, found.bound_deviation)
    axes[0].set(title="largest score up to a distance", xlabel="distance", ylabel="score")
    _curves(axes[1], found.lengths, found.entropy.mean(1), found.entropy.std(1))
    axes[1].plot(found.lengths, np.log(found.lengths), "k:", label="ln n")
    axes[1].set(title="entropy of attention", xlabel="keys", ylabel="nats")
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.axvline(found.config.trained, color="grey", linestyle="--")
        axis.legend(fontsize="small")
    _sinks(figure, axes[2], found)
    _separation(axes[3], found)
    _features(figure, axes[4], found, layer)
    if recommendation is not None:
        _settings(axes[5], recommendation)
    return figure


def _curves(axis: Any, x: Any, means: Any, deviations: Any) -> None:
    for layer, (mean, deviation) in enumerate(zip(means, deviations, strict=True)):
        (line,) = axis.plot(x, mean, label=f"layer {layer}")
        axis.fill_between(
            x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.15, linewidth=0
        )


def _sinks(figure: Any, axis: Any, found: Diagnosis) -> None:
    shown = axis.imshow(found.sinks[:, :, -1], vmin=0, aspect="auto", cmap="viridis")
    layers, heads = found.sinks.shape[:2]
    axis.set_xticks(range(heads))
    axis.set_yticks(range(layers))
    first = found.config.first
    axis.set(title=f"attention on the first {first} tokens", xlabel="head", ylabel="layer")
    figure.colorbar(shown, ax=axis)


def _separation(axis: Any, found: Diagnosis) -> None:
    for place, values in enumerate(found.separation):
        axis.plot(range(len(values)), values, marker="o", label=_place(place))
    axis.axhline(1, color="grey", linestyle="--")
    axis.set(title="how far first tokens lie apart", xlabel="position", ylabel="times the spread")
    axis.legend(fontsize="small")


def _features(figure: Any, axis: Any, found: Diagnosis, layer: int | None) -> None:
    place = int(found.separation[:, 0].argmax()) if layer is None else layer + 1
    points = found.components[place]
    positions = np.broadcast_to(np.arange(points.shape[1]), points.shape[:2])
    shown = axis.scatter(
        points[..., 0], points[..., 1], c=positions, s=4, cmap="coolwarm", rasterized=True
    )
    first = points[:, 0]
    axis.scatter(first[:, 0], first[:, 1], marker="x", color="black", label="first token")
    shares = " and ".join(f"{share:.0%}" for share in found.explained[place])
    axis.set(title=f"features, {_place(place)} ({shares} of variance)")
    axis.legend(fontsize="small")
    figure.colorbar(shown, ax=axis, label="position")


def _settings(axis: Any, recommendation: Recommendation) -> None:
    for sinks in recommendation.config.sinks:
        tried = [one for one in recommendation.settings if one.sinks == sinks]
        windows, losses = zip(*((one.window, one.nll) for one in tried), strict=True)
        axis.plot(windows, losses, marker="o", label=f"{sinks} sinks")
    chosen = recommendation.chosen
    axis.scatter([chosen.window], [chosen.nll], s=150, facecolors="none", edgecolors="black")
    axis.set(title=f"loss at {recommendation.length:,} tokens", xlabel="window", ylabel="nats")
    axis.set_xscale("log")
    axis.legend(fontsize="small")


def _place(number: int) -> str:
    return "embeddings" if number == 0 else f"behind layer {number - 1}"
