"""Configurations: frozen dataclasses that validate themselves and round-trip to JSON.

Torch-free, so that command-line help is instant. ``to_dict`` writes the class name and a
``format_version`` beside the fields; ``from_dict`` refuses another class, a newer version and
unknown fields, because a setting that is silently dropped changes results silently.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from memlm.core.errors import InputError


@dataclass(frozen=True)
class Config:
    """Base of every memlm configuration. Subclasses are frozen dataclasses of plain JSON values."""

    format_version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, with the class name and format version."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"kind": type(self).__name__, "format_version": self.format_version, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that ``to_dict`` wrote.

        Raises:
            InputError: for another class, a newer format version or unknown fields.
        """
        rest = dict(values)
        kind = rest.pop("kind", cls.__name__)
        version = rest.pop("format_version", cls.format_version)
        if kind != cls.__name__:
            raise InputError(f"expected the settings of a {cls.__name__}, got those of a {kind}")
        if version > cls.format_version:
            raise InputError(
                f"{cls.__name__} settings of format {version} are newer than this memlm reads "
                f"({cls.format_version}); upgrade memlm"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(rest) - known):
            raise InputError(
                f"{cls.__name__} has no setting named {', '.join(unknown)}; "
                f"it has {', '.join(sorted(known))}"
            )
        return cls(**{name: _hashable(value) for name, value in rest.items()})


def check(condition: bool, message: str) -> None:
    """Raise ``InputError(message)`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def check_at_least(config: Config, least: int, *names: str) -> None:
    """Raise ``InputError`` unless every field named is None or at least ``least``."""
    for name in names:
        value = getattr(config, name)
        check(value is None or value >= least, f"{name} must be at least {least}, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value
