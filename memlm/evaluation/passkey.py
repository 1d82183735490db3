"""Accuracy of passkey retrieval by length and depth, for any causal model.

At every length and depth the same keys are hidden in filler (`data.passkey`), the model continues
the question greedily, and the first number that it writes must be the key. A model with a plain
window forgets a key that has left the window, however low its perplexity: this is the task that
shows it. Source: LM-Infinite (Han et al. 2024), section 4.4.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import Config, check
from memlm.core.progress import bar
from memlm.data.passkey import exact_passkeys
from memlm.evaluation.answers import write_answers
from memlm.evaluation.figures import panels

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class PasskeyConfig(Config):
    """What is asked.

    Attributes:
        lengths: of the prompts, in tokens.
        depths: shares of the filler before the key, from 0 to 1.
        samples: prompts per length and depth.
        seed: of the keys.
        batch_tokens: most tokens that are read side by side.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    seed: int = 0
    batch_tokens: int = 32_768

    def __post_init__(self) -> None:
        check(len(self.lengths) > 0, "retrieval needs at least one length, got none")
        check(len(self.depths) > 0, "retrieval needs at least one depth, got none")
        outside = [depth for depth in self.depths if not 0 <= depth <= 1]
        check(not outside, f"depths must be from 0 to 1, got {outside}")
        check(self.samples >= 1, f"there must be at least 1 sample, got {self.samples}")


class PasskeyPoint(NamedTuple):
    """One length and depth.

    Attributes:
        length: tokens of each prompt.
        depth: share of the filler before the key.
        correct: prompts whose key was found.
        samples: prompts.
    """

    length: int
    depth: float
    correct: int
    samples: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1."""
        return self.correct / self.samples


@dataclass(frozen=True)
class PasskeyResult:
    """Accuracy at every length and depth.

    Attributes:
        config: what was asked.
        points: length by length, in the order of depths.
    """

    config: PasskeyConfig
    points: tuple[PasskeyPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**x._asdict(), "accuracy": x.accuracy} for x in self.points]
        return {"config": self.config.to_dict(), "protocol": self.describe(), "points": rows}

    def describe(self) -> str:
        """One line of protocol."""
        config = self.config
        return (
            f"share of {config.samples} keys of five digits (seed {config.seed}) that are the "
            "first number written, greedily; prompts of exactly so many tokens, question included; "
            "depth: share of the filler before the key"
        )

    def accuracy(self, length: int) -> float:
        """Mean over depths at one length."""
        points = [point for point in self.points if point.length == length]
        check(len(points) > 0, f"the length must be one of {self.config.lengths}, got {length}")
        return sum(point.accuracy for point in points) / len(points)

    def table(self) -> Group:
        """A row per depth and a column per length, to print with rich."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("depth", no_wrap=True)
        for length in self.config.lengths:
            table.add_column(f"{length:,}", justify="right")
        found = {(point.length, point.depth): point.accuracy for point in self.points}
        for depth in self.config.depths:
            row = (f"{found[length, depth]:.0%}" for length in self.config.lengths)
            table.add_row(f"{depth:.0%}", *row)
        means = (f"{self.accuracy(length):.0%}" for length in self.config.lengths)
        table.add_row("mean", *means, style="bold")
        return Group(table, Text(f"protocol: {self.describe()}", style="dim"))


def measure_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PasskeyConfig,
    *,
    progress: bool = True,
) -> PasskeyResult:
    """Ask one model for keys at every length and depth.

    Args:
        model: causal; extended (``extend_context``), with a memory, or as it is.
        tokenizer: of the model.
        config: what to ask.
        progress: show a bar.

    Raises:
        InputError: if a length leaves no room for filler.
        UnsupportedModelError: if the model has a table of positions that ends before a length.
    """
    points = []
    plan = [(length, depth) for length in config.lengths for depth in config.depths]
    total = sum(length for length, _ in plan) * config.samples
    with bar(total, label="passkey", unit="token", quiet=not progress) as shown:
        for length, depth in plan:
            prompts = exact_passkeys(tokenizer, length, depth, config.samples, seed=config.seed)
            keys = [prompt.key for prompt in prompts]
            answers = write_answers(
                model,
                tokenizer,
                [prompt.tokens for prompt in prompts],
                new_tokens=_answer_tokens(tokenizer, keys),
                batch_tokens=config.batch_tokens,
            )
            correct = sum(found_key(*pair) for pair in zip(answers, keys, strict=True))
            points.append(PasskeyPoint(length, depth, correct, config.samples))
            shown.update(length * config.samples)
    return PasskeyResult(config, tuple(points))


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, keys: Sequence[str]) -> int:
    """Enough for any of the keys and for seeing that no digit follows."""
    longest = max(len(tokenizer.encode(f" {key}", add_special_tokens=False)) for key in keys)
    return longest + 2


def found_key(prediction: str, key: str) -> bool:
    """Whether the first number of a prediction is the key; without any number it counts as 0."""
    number = _DIGITS.search(prediction)
    return int(number.group() if number else 0) == int(key)


def passkey_accuracy(predictions: Sequence[str], keys: Sequence[str]) -> float:
    """Share of predictions that name their key, from 0 to 1.

    Raises:
        InputError: if there is none, or not one key for each.
    """
    check(
        len(predictions) == len(keys) > 0,
        f"there must be as many predictions as keys, and at least one, got {len(predictions)} and "
        f"{len(keys)}",
    )
    return sum(found_key(*pair) for pair in zip(predictions, keys, strict=True)) / len(keys)


def plot(results: Mapping[str, PasskeyResult], path: str) -> None:
    """Accuracy as a map of length and depth, one panel per result, four in a row, as an image.

    Args:
        results: by title.
        path: of the image; its ending is the format.

    Raises:
        MissingExtraError: without matplotlib.
    """
    figure, axes = panels(len(results), rows=-(-len(results) // 4))
    for axis, (title, result) in zip(axes, results.items(), strict=True):
        lengths, depths = result.config.lengths, result.config.depths
        found = {(point.length, point.depth): point.accuracy for point in result.points}
        rows = [[found[length, depth] for length in lengths] for depth in depths]
        shown = axis.imshow(rows, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=title, xlabel="tokens", ylabel="depth of the key")
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        figure.colorbar(shown, ax=axis, label="accuracy")
    figure.savefig(path)
