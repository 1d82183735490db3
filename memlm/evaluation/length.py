"""Perplexity against length: the same tokens, predicted after shorter and longer texts.

From one long stream of tokens, pieces are chosen. The last `scored` tokens of every piece are
predicted after n - scored tokens of context, for each length n and by each method:

    ppl@n  = exp( mean over pieces of -log p(token | the n - scored tokens before the piece's end) )

The targets are the same at every length, so a difference is the doing of the context alone. Beside
it stands the average over *all* tokens of the pieces (``cumulative``), whose targets differ with n.

The methods: the model as it is; truncation (it reads only the last `window` tokens of a piece);
Lambda attention without sinks (a plain window), with StreamingLLM's positions, and LM-Infinite's;
rotary scalings to n. Several processes share the batches of pieces.

Source: LM-Infinite (Han et al. 2024), section 4.2, whose figure plots
position against loss and whose table has ppl@n.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from itertools import chain, zip_longest
from typing import Any, Literal, Self

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.core.processes import gather, rank_and_size
from memlm.core.progress import bar
from memlm.data.slices import truncate
from memlm.evaluation.figures import panels
from memlm.evaluation.reader import enough_positions, read_whole
from memlm.evaluation.ways import WAYS, reading
from memlm.models.rope_scaling import SCALINGS, scaled_rope
from memlm.ops.middle_rule import MiddleConfig

_FULL = ("vanilla", *SCALINGS)
METHODS = (WAYS[0], "truncation", *WAYS[1:], *SCALINGS)


@dataclass(frozen=True)
class LengthConfig(Config):
    """What is measured.

    Attributes:
        lengths: of the pieces, in tokens.
        window: of the methods that have one, and of truncation.
        sinks: first tokens that stay visible.
        middle: tokens that a query selects, for lm-infinite-middle.
        methods: some of ``METHODS``.
        pieces: how many.
        scored: tokens at the end of each piece that are the same for all lengths.
        full_limit: longest piece for the methods of full attention, whose time grows with its
            square; None: all.
        batch_tokens: most tokens that are read side by side.
        side: what truncation cuts off: ``"left"``, the beginning, or ``"center"``.
    """

    lengths: tuple[int, ...]
    window: int
    sinks: int = 10
    middle: MiddleConfig | None = None
    methods: tuple[str, ...] = ("vanilla", "truncation", "window", "streaming-llm", "lm-infinite")
    pieces: int = 8
    scored: int = 128
    full_limit: int | None = None
    batch_tokens: int = 32_768
    side: Literal["left", "center"] = "left"

    def __post_init__(self) -> None:
        if isinstance(self.middle, Mapping):  # from JSON
            object.__setattr__(self, "middle", MiddleConfig.from_dict(self.middle))
        check(len(self.lengths) > 0, "a measurement needs at least one length, got none")
        check(
            min(self.lengths) > self.scored >= 1,
            f"every length must exceed the {self.scored} scored tokens, got {min(self.lengths)}; "
            "score fewer",
        )
        check(
            self.window > self.scored or "truncation" not in self.methods,
            f"truncation to {self.window} tokens must leave some before the {self.scored} scored "
            "ones; score fewer",
        )
        check(
            self.side in ("left", "center"),
            f"truncation must keep the scored end of a piece, so side must be left or center, got "
            f"{self.side!r}",
        )
        check(
            self.side == "left" or self.window - self.window // 2 > self.scored,
            f"half of the {self.window} tokens of a truncation in the centre must exceed the "
            f"{self.scored} scored ones; score fewer",
        )
        unknown = [name for name in self.methods if name not in METHODS]
        check(not unknown, f"methods must be among {', '.join(METHODS)}, got {unknown}")
        check(self.pieces >= 1, f"there must be at least 1 piece, got {self.pieces}")


@dataclass(frozen=True)
class LengthPoint:
    """One method at one length.

    Attributes:
        method: its name.
        length: tokens of each piece.
        nll: mean over the scored tokens at the end of the pieces, nats.
        cumulative_nll: mean over all tokens of the pieces; None for truncation.
        error: standard error of ``nll`` over pieces; None for a single one.
        seconds: for all pieces.
    """

    method: str
    length: int
    nll: float
    cumulative_nll: float | None
    error: float | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``; infinite where it cannot be written."""
        return math.exp(self.nll) if self.nll < 700 else math.inf


@dataclass(frozen=True)
class LengthCurve:
    """All points, with what they mean.

    Attributes:
        config: what was measured.
        points: method by method, in the order of lengths.
        ends: where the pieces end in the stream of tokens.
    """

    config: LengthConfig
    points: tuple[LengthPoint, ...]
    ends: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**asdict(x), "perplexity": x.perplexity} for x in self.points]
        return {
            "config": self.config.to_dict(),
            "protocol": self.describe(),
            "ends": list(self.ends),
            "points": rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What ``to_dict`` wrote."""
        names = [field.name for field in fields(LengthPoint)]
        points = (LengthPoint(*(row[name] for name in names)) for row in values["points"])
        return cls(LengthConfig.from_dict(values["config"]), tuple(points), tuple(values["ends"]))

    def describe(self) -> str:
        """One line of protocol."""
        config = self.config
        middle = f", {config.middle.describe()}" if config.middle else ""
        return (
            f"perplexity of the last {config.scored} tokens of {len(self.ends)} pieces, the same "
            f"at every length; window {config.window}, {config.sinks} sinks{middle}; per token, "
            "natural log"
        )

    def table(self) -> Group:
        """A row per method and a column per length, to print with rich."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("ppl@n", no_wrap=True)
        for length in self.config.lengths:
            table.add_column(f"{length:,}", justify="right")
        for method in self.config.methods:
            found = {x.length: f"{x.perplexity:,.2f}" for x in self.points if x.method == method}
            table.add_row(method, *(found.get(length, "-") for length in self.config.lengths))
        return Group(table, Text(f"protocol: {self.describe()}", style="dim"))


def measure_lengths(
    model: PreTrainedModel,
    tokens: Sequence[int] | np.ndarray,
    config: LengthConfig,
    *,
    progress: bool = True,
) -> LengthCurve:
    """Perplexity of one model by every method at every length.

    Args:
        model: causal, not extended; given back as it was.
        tokens: one long stream, at least as long as the longest length.
        config: what to measure.
        progress: show a bar.

    Raises:
        InputError: if the stream is too short.
        UnsupportedModelError: if the model cannot be extended or scaled, or has a table of
            positions that ends before a length.
    """
    stream = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
    longest = max(config.lengths)
    check(
        len(stream) >= longest,
        f"the text must have the {longest} tokens of the longest piece, got {len(stream)}; give "
        "more text or smaller lengths",
    )
    ends = sorted({int(end) for end in np.linspace(longest, len(stream), config.pieces)})
    points = []
    plan = [
        (method, length)
        for method in config.methods
        for length in config.lengths
        if method not in _FULL or length <= (config.full_limit or length)
    ]
    total = sum(length for _, length in plan) * len(ends)
    quiet = not progress or rank_and_size()[0] > 0
    with bar(total, label="lengths", unit="token", quiet=quiet) as shown:
        for method, length in plan:
            points.append(_measure(model, stream, ends, method, length, config))
            shown.update(length * len(ends))
    return LengthCurve(config, tuple(points), tuple(ends))


def _measure(
    model: PreTrainedModel,
    stream: Tensor,
    ends: list[int],
    method: str,
    length: int,
    config: LengthConfig,
) -> LengthPoint:
    read = min(length, config.window) if method == "truncation" else length
    whole = [stream[end - length : end].tolist() for end in ends]
    pieces = torch.tensor([truncate(piece, read, config.side) for piece in whole])
    rows, (rank, size) = max(1, config.batch_tokens // read), rank_and_size()
    start = time.perf_counter()
    with enough_positions(model, read), _prepared(model, method, length, config) as ready:
        mine = [read_whole(ready, part).cpu() for part in pieces.split(rows)[rank::size]]
    dealt = gather((mine, time.perf_counter() - start))
    # dealt like cards: the first batch of every process, then the second ...
    batches = chain.from_iterable(zip_longest(*(parts for parts, _ in dealt)))
    losses = torch.cat([batch for batch in batches if batch is not None])
    seconds = max(spent for _, spent in dealt)
    means = losses[:, -config.scored :].mean(1)
    return LengthPoint(
        method=method,
        length=length,
        nll=float(means.mean()),
        cumulative_nll=None if method == "truncation" else float(losses.mean()),
        error=float(means.std() / len(means) ** 0.5) if len(means) > 1 else None,
        seconds=seconds,
    )


def _prepared(
    model: PreTrainedModel, method: str, length: int, config: LengthConfig
) -> AbstractContextManager[PreTrainedModel]:
    if method in SCALINGS:
        return scaled_rope(model, method, length)
    way = WAYS[0] if method == "truncation" else method
    return reading(model, way, window=config.window, sinks=config.sinks, middle=config.middle)


def plot(curves: Mapping[str, LengthCurve], path: str) -> None:
    """Perplexity against length, one panel per curve, as an image.

    Args:
        curves: by title.
        path: of the image; its ending is the format.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = panels(len(curves))
    for axis, (title, curve) in zip(axes, curves.items(), strict=True):
        for method in curve.config.methods:
            points = [x for x in curve.points if x.method == method]
            if not points:
                continue
            lengths, perplexities = zip(*((x.length, x.perplexity) for x in points), strict=True)
            axis.plot(lengths, perplexities, marker="o", label=method)
        axis.set(xscale="log", yscale="log", title=title, xlabel="tokens", ylabel="perplexity")
    axes[0].legend()
    figure.savefig(path)
