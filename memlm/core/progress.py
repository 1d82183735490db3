"""Progress bars with rate and remaining time, shown only for work that takes over two seconds."""

import sys

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
