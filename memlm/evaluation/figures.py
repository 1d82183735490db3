"""Empty figures of matplotlib, which is an optional package."""

from typing import Any

from memlm.core.errors import MissingExtraError


def panels(count: int, *, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its panels, beside each other or in several rows.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib, which is not installed; run pip install 'memlm[plot]'"
        ) from error
    columns = -(-count // rows)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]
