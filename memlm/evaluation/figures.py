"""Empty figures of matplotlib, which is an optional package."""

from typing import Any

from memlm.core.errors import MissingExtraError


def panels(count: int) -> tuple[Any, Any]:
    """A figure and its panels beside each other.

    Raises:
        MissingExtraError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib, which is not installed; run pip install 'memlm[plot]'"
        ) from error
    figure = Figure(figsize=(5 * count, 4), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]
