"""Progress bars with rate and remaining time, shown only for work that takes over two seconds."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

_DELAY_SECONDS = 2.0


def bar(total: int | None, *, label: str, unit: str, initial: int = 0, quiet: bool = False) -> tqdm:
    """A progress bar to update by hand; use it in a ``with`` statement.

    Args:
        total: how many units there are, None if unknown.
        label: what is being done, e.g. ``"extract"``.
        unit: what is counted, e.g. ``"token"``; the rate is printed per second.
        initial: units done before (a resumed build).
        quiet: never show it.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        unit_scale=True,
        delay=_DELAY_SECONDS,
        disable=quiet or None if sys.stderr.isatty() else quiet,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )


def track(
    items: Iterable[Any], *, label: str, unit: str, total: int | None = None
) -> Iterator[Any]:
    """Iterate with a progress bar of one unit per item."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(total, label=label, unit=unit) as progress:
        for item in items:
            yield item
            progress.update(1)
