"""Optional dependencies: imported where they are used, missing ones named with the pip command."""

import importlib
from types import ModuleType

from memlm.core.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module`` or say how to install it.

    Args:
        module: import name, e.g. ``"zstandard"``.
        extra: the extra of memlm that brings it.
        purpose: what it is needed for, completing "... is needed to".

    Raises:
        MissingExtraError: if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"the package '{module}' is needed to {purpose} but is not installed; "
            f"run: pip install 'memlm[{extra}]'"
        ) from error
