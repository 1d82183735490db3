"""Which models can be extended, and why others cannot.

Lambda attention needs to set the distance of a query and a key freely, so a model's positions must
act through distances alone and through a place that can be reached: a rotary module of the body
whose frequencies do not depend on the length, behind transformers' attention interface, or an
attention module with an adapter (`memlm.models.adapters`).

Families of the list are tested one by one. Any other of the first kind is taken if it passes
the probe (`memlm.models.extend_probe`).
"""

import inspect
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.adapters import ADAPTERS

# behind the attention interface, with a rotary module in the body
ROTARY = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "stablelm",
    "starcoder2",
)
FAMILIES = tuple(sorted((*ROTARY, *ADAPTERS)))

# scalings whose frequencies do not depend on the length of the input
_ROPE_TYPES = ("default", "linear", "llama3", "proportional", "yarn")


def own_window(layer: nn.Module) -> int | None:
    """The sliding window that an attention layer was trained with, None for a full one."""
    return getattr(layer, "sliding_window", None)


def has_rotation(layer: nn.Module, family: str) -> bool:
    """False for the layers without any position (NoPE) of Cohere 2 and SmolLM 3."""
    if family == "cohere2":
        return own_window(layer) is not None
    return bool(getattr(layer, "use_rope", True))


def check_family(model: PreTrainedModel, inner: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse a model whose distances cannot be set.

    Args:
        model: the causal language model.
        inner: its body.
        layers: its attention modules.

    Raises:
        UnsupportedModelError: saying what is in the way.
    """
    family, config = model.config.model_type, model.config.get_text_config()
    if getattr(config, "kv_lora_rank", None) is not None:
        raise UnsupportedModelError(
            "keys must be cached as they are attended, but multi-head latent attention (MLA) of "
            f"{family!r} splits them into a rotated and an unrotated part of its own; use a model "
            "with ordinary attention"
        )
    for settings in _rope_settings(config):
        if "mrope_section" in settings:
            raise UnsupportedModelError(
                f"a token must have one position, but the rotary embedding of {family!r} has "
                "three (M-RoPE: time, height, width); use a text model"
            )
        rope = settings.get("rope_type", "default")
        if rope not in _ROPE_TYPES:
            raise UnsupportedModelError(
                f"the rotary scaling must be one of {', '.join(_ROPE_TYPES)}, whose frequencies "
                f"do not depend on the length, got {rope!r}; set rope_parameters in the config"
            )
    if any(getattr(layer, "is_causal", True) is False for layer in layers):
        raise UnsupportedModelError(
            f"attention must be causal, but a layer of {type(model).__name__} sees later tokens; "
            "use a causal language model"
        )
    if family not in FAMILIES:
        _check_unknown(model, inner, layers)


def _check_unknown(model: PreTrainedModel, inner: nn.Module, layers: list[nn.Module]) -> None:
    """What a rotary model behind the interface must have; the probe decides the rest."""
    missing = None
    if not isinstance(getattr(inner, "rotary_emb", None), nn.Module):
        missing = "a rotary module `rotary_emb` in its body"
    elif not layers or not all(
        hasattr(sys.modules[type(layer).__module__], "apply_rotary_pos_emb") for layer in layers
    ):
        missing = "a function `apply_rotary_pos_emb` beside each of its attention layers"
    elif not model._can_set_attn_implementation():
        missing = "an attention that goes through transformers' AttentionInterface"
    if missing:
        raise UnsupportedModelError(
            f"extend_context knows the families {', '.join(FAMILIES)}, and others only if they "
            f"have {missing}, got {model.config.model_type!r}; use a model of one of them"
        )


def check_window(model: PreTrainedModel, layers: list[nn.Module], window: int | None) -> None:
    """Refuse to let layers that slide see further than their own window.

    Args:
        model: the causal language model.
        layers: its attention modules.
        window: what full layers shall see; None: everything.

    Raises:
        InputError: naming both windows.
    """
    own = uniform_window(model)
    if window is None:
        own = own or next(filter(None, map(own_window, layers)), None)
        if own is not None:
            raise InputError(
                f"middle='kept' needs a model of full attention, got sliding windows of {own}; "
                "pass middle='dropped'"
            )
        return
    if own is not None and window > own:
        raise InputError(
            f"window must not exceed the model's own sliding window of {own}, got {window}; "
            "choose a smaller window"
        )


def uniform_window(model: PreTrainedModel) -> int | None:
    """The sliding window of a model that has one and the same in every layer."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ("sliding_attention",))
    return getattr(config, "sliding_window", None) if types == {"sliding_attention"} else None


def takes_layer_type(rotary: nn.Module) -> bool:
    """Whether a rotary module has one table per kind of layer (Gemma 3)."""
    return "layer_type" in inspect.signature(rotary.forward).parameters


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a model, one per kind of layer where kinds differ."""
    settings = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return nested or [settings]
