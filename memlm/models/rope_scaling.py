"""Rotary scaling put into a loaded model for a while: the usual way to longer texts.

Position interpolation (``linear``, Chen et al. 2023), NTK-aware scaling (``dynamic``) and YaRN
(Peng et al. 2023) squeeze the positions of a longer text into those of training. They keep full
attention, n x n, and work best with some training; here they are baselines. The rotary module of
the body is replaced by one of the same class with other settings, and put back afterwards.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import UnsupportedModelError
from memlm.models.extend import is_extended
from memlm.models.running import device_of
from memlm.models.taps import body
from memlm.models.trained_length import trained_length

SCALINGS = ("linear", "dynamic", "yarn")


@contextmanager
def scaled_rope(model: PreTrainedModel, kind: str, length: int) -> Iterator[PreTrainedModel]:
    """The model with its rotary positions scaled to ``length`` tokens, for the block.

    Args:
        model: with one rotary module in its body, not extended.
        kind: one of ``SCALINGS``.
        length: of the texts; up to the trained length nothing is changed.

    Raises:
        InputError: for an unknown kind.
        UnsupportedModelError: if there is no such module, or it is scaled or extended already.
    """
    check(kind in SCALINGS, f"the scaling must be one of {', '.join(SCALINGS)}, got {kind!r}")
    inner: Any = body(model)
    rotary = getattr(inner, "rotary_emb", None)
    settings = getattr(model.config, "rope_parameters", None) or {}
    if rotary is None or settings.get("rope_type", "default") != "default" or is_extended(model):
        raise UnsupportedModelError(
            "rotary scaling needs a model with one plain rotary module in its body, got a "
            f"{type(model).__name__} that is scaled or extended already, or has other positions; "
            "leave this baseline out"
        )
    trained = trained_length(model)
    if length <= trained:
        yield model
        return
    config = copy.deepcopy(model.config)
    config.rope_parameters = {
        **settings,
        "rope_type": kind,
        "factor": length / trained,
        "original_max_position_embeddings": trained,
    }
    inner.rotary_emb = type(rotary)(config=config).to(device_of(model))
    try:
        yield model
    finally:
        inner.rotary_emb = rotary
