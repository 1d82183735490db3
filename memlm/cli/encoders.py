"""Loading encoders for the command line: TUPE's are known, new heads expected, errors ours."""

from typing import Any

from memlm.core.errors import InputError, first_line


def load_encoder(name: str, kind: str, **options: Any) -> Any:
    """A model of one of transformers' Auto classes, in float32.

    Args:
        name: folder or Hub id.
        kind: of the Auto class, such as ``"AutoModel"``.
        options: for ``from_pretrained``.

    Raises:
        InputError: if ``name`` is no such model.
    """
    import torch
    import transformers
    from transformers.utils import logging

    import memlm.models.tupe.heads  # noqa: F401  registers TUPE's models

    shown = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # a new head is what fine-tuning wants
    try:
        return getattr(transformers, kind).from_pretrained(name, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"the model must be a folder or Hub id that {kind} loads, got {name!r}: "
            f"{first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(shown)
