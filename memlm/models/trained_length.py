"""How long a text a model was trained on, or can read at all."""

from typing import Any

from transformers import PreTrainedModel

from memlm.core.errors import InputError

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def trained_length(model: PreTrainedModel) -> int:
    """Tokens of the longest sequence the model was trained on, before any rotary scaling.

    Raises:
        InputError: if the configuration does not say.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if original := rope.get("original_max_position_embeddings"):
        return int(original)
    for name in _NAMES:
        if length := getattr(config, name, None):
            return int(length)
    raise InputError(
        f"the configuration of {type(model).__name__} must say what length it was trained on, but "
        "does not; give a window"
    )


def readable_length(model: PreTrainedModel) -> int | None:
    """Tokens of the longest text an encoder can read; None where there is no limit."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if not longest or getattr(model.config, "position_extension", "error") != "error":
        return None
    embeddings: Any = getattr(model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    pad = getattr(table, "padding_idx", None)  # RoBERTa's positions begin after the padding's
    return longest if pad is None else longest - pad - 1
