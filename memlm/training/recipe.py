"""Recipes: the settings of a training in a file, with changes from the command line.

A recipe is a TOML or JSON file of `TrainConfig`'s fields and, if wanted, two lines more:

    preset = "small"                       what all that it does not say is taken from
    architecture = "decoder.json"          a Hugging Face configuration beside the recipe: the model
                                           from scratch is one of these instead of a small Llama

What is said later wins: preset, recipe, changes. Free of torch.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.training.config import Preset, TrainConfig


class Recipe(NamedTuple):
    """What a recipe file says.

    Attributes:
        settings: `TrainConfig`'s fields by name.
        preset: the name of a preset, or None.
        architecture: the path of a Hugging Face configuration, or None.
    """

    settings: dict[str, Any]
    preset: str | None = None
    architecture: Path | None = None

    def config(self, *, preset: str | None = None, **changes: Any) -> TrainConfig:
        """The configuration of the recipe with some settings changed.

        Args:
            preset: in place of the recipe's; None: the recipe's, and without one ``"tiny"``.
            **changes: fields to set; a limit (steps or seconds) replaces the recipe's.

        Raises:
            InputError: for unknown settings or values out of range.
        """
        settings = dict(self.settings)
        if {"max_steps", "max_seconds"} & set(changes):
            for limit in ("max_steps", "max_seconds"):
                settings.pop(limit, None)
        name = preset or self.preset or "tiny"
        return TrainConfig.preset(cast(Preset, name), **{**settings, **changes})


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InputError: if it is no TOML or JSON table or holds an unknown setting.
    """
    path = Path(path)
    check(path.is_file(), f"a recipe must be a TOML or JSON file, but {path} is none")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise InputError(f"{path} must be readable as TOML or JSON, but is not: {error}") from error
    check(isinstance(values, Mapping), f"{path} must hold settings by name, but holds a list")
    values = {name: _hashable(value) for name, value in values.items()}
    architecture, preset = values.pop("architecture", None), values.pop("preset", None)
    known = {field.name for field in fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    check(
        not unknown,
        f"{path} holds settings that a training has not: {', '.join(unknown)}; it has "
        f"{', '.join(sorted(known))}, preset and architecture",
    )
    return Recipe(values, preset, None if architecture is None else path.parent / architecture)


def parse_changes(lines: Iterable[str]) -> dict[str, Any]:
    """``name=value`` pairs from a command line; values as in TOML, bare words are strings.

    Raises:
        InputError: if a line is no such pair.
    """
    changes = {}
    for line in lines:
        name, equals, value = line.partition("=")
        check(
            bool(equals and name.strip() and value.strip()),
            f"a change must be written name=value, got {line!r}",
        )
        changes[name.strip()] = _parsed(value.strip())
    return changes


def _parsed(value: str) -> Any:
    try:
        return _hashable(tomllib.loads(f"value = {value}")["value"])
    except tomllib.TOMLDecodeError:
        return value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
