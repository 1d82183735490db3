"""How many sinks and which window a model needs, measured where its own attention fails.

Long pieces of a held-out text are read with Lambda attention of every window and every number of
sinks that is tried, and the loss of their last tokens, the same ones everywhere, is compared:

    best      the setting of lowest mean loss
    chosen    of all whose mean loss is at most ``tolerance`` nats above that of the best, the one
              that holds the fewest keys, window + sinks; of equals the one of lower loss

so a larger window or more sinks must be worth their memory. The standard error of a setting's
excess over the best, paired over pieces, says whether the pieces are many enough to tell.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.core.progress import bar
from memlm.evaluation.reader import read_whole
from memlm.models.extend import extended


@dataclass(frozen=True)
class RecommendConfig(Config):
    """What is tried.

    Attributes:
        windows: tokens at their true distance.
        sinks: first tokens that stay visible.
        scored: tokens at the end of each piece that are compared.
        tolerance: nats of loss that a smaller setting may cost.
        batch_tokens: most tokens that are read side by side.
    """

    windows: tuple[int, ...]
    sinks: tuple[int, ...] = (0, 1, 4, 10)
    scored: int = 128
    tolerance: float = 0.01
    batch_tokens: int = 32_768

    def __post_init__(self) -> None:
        check(len(self.windows) > 0, "there must be at least one window to try, got none")
        check(len(self.sinks) > 0, "there must be at least one number of sinks to try, got none")
        check(min(self.windows) >= 1, f"windows must be at least 1, got {min(self.windows)}")
        check(min(self.sinks) >= 0, f"sinks must not be negative, got {min(self.sinks)}")
        check(self.scored >= 1, f"at least one token must be scored, got {self.scored}")
        check(self.tolerance >= 0, f"the tolerance must not be negative, got {self.tolerance}")


@dataclass(frozen=True)
class Setting:
    """One window and number of sinks.

    Attributes:
        window: tokens.
        sinks: first tokens.
        nll: mean loss of the scored tokens, nats.
        excess: above the best setting.
        error: standard error of ``excess`` over pieces; None for a single one.
    """

    window: int
    sinks: int
    nll: float
    excess: float
    error: float | None


@dataclass(frozen=True)
class Recommendation:
    """Every setting that was tried, and the one that the rule chooses.

    Attributes:
        config: what was tried.
        length: tokens of each piece.
        pieces: how many there were.
        vanilla: loss of the same tokens by the model as it is, nats.
        settings: window by window.
        chosen: among them.
    """

    config: RecommendConfig
    length: int
    pieces: int
    vanilla: float
    settings: tuple[Setting, ...]
    chosen: Setting

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "config": self.config.to_dict(),
            "length": self.length,
            "pieces": self.pieces,
            "protocol": self.describe(),
            "vanilla": self.vanilla,
            "settings": [asdict(setting) for setting in self.settings],
            "chosen": asdict(self.chosen),
        }

    def describe(self) -> str:
        """One line of protocol."""
        config = self.config
        return (
            f"mean loss of the last {config.scored} tokens of {self.pieces} pieces of "
            f"{self.length} tokens; fewest keys within {config.tolerance:g} nats of the best"
        )

    def table(self) -> Group:
        """A row per window and a column per number of sinks, to print with rich."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("window")
        for sinks in self.config.sinks:
            table.add_column(f"{sinks} sinks", justify="right")
        losses = {(one.window, one.sinks): one.nll for one in self.settings}
        for window in self.config.windows:
            row = (f"{losses[window, sinks]:.4f}" for sinks in self.config.sinks)
            table.add_row(f"{window:,}", *row)
        chosen = self.chosen
        edge = " (no smaller window was tried)" if chosen.window == min(self.config.windows) else ""
        error = "" if chosen.error is None else f", standard error {chosen.error:.4f}"
        told = (
            f"recommended: window {chosen.window}, {chosen.sinks} sinks{edge}: "
            f"{chosen.nll:.4f} nats, {chosen.excess:.4f} above the best{error}; "
            f"the model as it is: {self.vanilla:.4f}"
        )
        return Group(table, Text(told), Text(f"protocol: {self.describe()}", style="dim"))


def recommend(
    model: PreTrainedModel, pieces: Tensor, config: RecommendConfig, *, progress: bool = True
) -> Recommendation:
    """Try every setting.

    Args:
        model: causal, not extended; given back as it was.
        pieces: ``(pieces, length)`` int64, longer than the trained length.
        config: what to try.
        progress: show a bar.

    Raises:
        InputError: if pieces are not longer than what is scored, or a window is too large for the
            model.
        UnsupportedModelError: if the model cannot be extended.
    """
    count, length = pieces.shape
    check(
        length > config.scored,
        f"pieces must be longer than the {config.scored} scored tokens, got {length}; score fewer",
    )
    tried = [(window, sinks) for window in config.windows for sinks in config.sinks]
    losses = {}
    with bar((len(tried) + 1) * pieces.numel(), label="settings", unit="token",
             quiet=not progress) as shown:  # fmt: skip
        for setting in (None, *tried):
            losses[setting] = _losses(model, pieces, setting, config)
            shown.update(pieces.numel())
    best = min(tried, key=lambda setting: float(losses[setting].mean()))
    found = []
    for window, sinks in tried:
        means = losses[window, sinks]
        more = means - losses[best]
        error = float(more.std() / count**0.5) if count > 1 else None
        found.append(Setting(window, sinks, float(means.mean()), float(more.mean()), error))
    return Recommendation(
        config, length, count, float(losses[None].mean()), tuple(found), choose(found, config)
    )


def choose(settings: Sequence[Setting], config: RecommendConfig) -> Setting:
    """The setting with the fewest keys within the tolerance."""
    near = [setting for setting in settings if setting.excess <= config.tolerance]
    return min(near, key=lambda setting: (setting.window + setting.sinks, setting.nll))


def _losses(
    model: PreTrainedModel,
    pieces: Tensor,
    setting: tuple[int, int] | None,
    config: RecommendConfig,
) -> Tensor:
    """``(pieces,)`` float64: mean loss of the scored tokens of each piece."""
    way = nullcontext(model)
    if setting is not None:
        way = extended(model, window=setting[0], sinks=setting[1])
    rows = max(1, config.batch_tokens // pieces.shape[1])
    with way as ready:
        parts = [read_whole(ready, part)[:, -config.scored :] for part in pieces.split(rows)]
    return torch.cat([part.mean(1).cpu() for part in parts])
