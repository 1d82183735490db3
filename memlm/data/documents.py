"""Documents: named texts."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text and where it came from."""

    name: str
    text: str
