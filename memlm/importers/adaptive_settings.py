"""What a fairseq run's settings say of its language model, and the other way.

Settings that this decoder has no way for (learnt positions, characters, norms after the residual)
are refused by name. The vocabulary's size and whether there is a norm at the end are read from the
tensors, where old versions of the settings differ in their names.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from memlm.core.config import check
from memlm.models.adaptive.config import AdaptiveConfig

PREFIX = "decoder."
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_fast": "gelu_pytorch_tanh"}
# what a setting must be where this decoder has no other way; the default is fairseq's
_FIXED = {
    "decoder_normalize_before": (True, True),
    "decoder_learned_pos": (False, False),
    "no_token_positional_embeddings": (False, False),
    "character_embeddings": (False, False),
    "layernorm_embedding": (False, False),
}


def config_of(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdaptiveConfig:
    """The configuration that a run's settings and tensors describe.

    Args:
        settings: of the checkpoint (``args``, or task and model of ``cfg``).
        tensors: by fairseq's names; they say the vocabulary's size and whether there is a norm at
            the end.

    Raises:
        InputError: if a setting is missing or asks for what this decoder does not have.
    """
    missing = [
        name
        for name in (
            "decoder_embed_dim",
            "decoder_ffn_embed_dim",
            "decoder_layers",
            "decoder_attention_heads",
        )
        if settings.get(name) is None
    ]
    check(not missing, f"the settings of a language model must say {missing}, but do not")
    width = int(settings["decoder_embed_dim"])
    for name, (wanted, default) in _FIXED.items():
        check(
            bool(_setting(settings, name, default)) == wanted,
            f"{name} must be {wanted} for this decoder, got {settings.get(name)}; the checkpoint "
            "cannot be imported",
        )
    for name in ("decoder_input_dim", "decoder_output_dim"):
        got = int(_setting(settings, name, width))
        check(got == width, f"{name} must be decoder_embed_dim ({width}) here, got {got}")
    activation = str(_setting(settings, "activation_fn", "relu"))
    check(
        activation in _ACTIVATIONS,
        f"activation_fn must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}",
    )
    adaptive_input = bool(settings.get("adaptive_input"))
    softmax_cutoffs = _cutoffs(settings.get("adaptive_softmax_cutoff"))
    input_cutoffs = _cutoffs(settings.get("adaptive_input_cutoff")) if adaptive_input else None
    tied_bands = bool(settings.get("tie_adaptive_weights"))
    # the name before 2019
    tie_projections = not settings.get("no_tie_adaptive_proj", True)
    shared = bool(settings.get("share_decoder_input_output_embed"))
    activation_dropout = settings.get("activation_dropout") or settings.get("relu_dropout") or 0.0
    length = settings.get("max_target_positions") or settings.get("tokens_per_sample") or 1024
    return AdaptiveConfig(
        vocab_size=_vocabulary(tensors),
        hidden_size=width,
        num_hidden_layers=int(settings["decoder_layers"]),
        num_attention_heads=int(settings["decoder_attention_heads"]),
        intermediate_size=int(settings["decoder_ffn_embed_dim"]),
        max_position_embeddings=int(length),
        hidden_act=_ACTIVATIONS[activation],
        input_cutoffs=input_cutoffs,
        output_cutoffs=softmax_cutoffs,
        input_factor=float(_setting(settings, "adaptive_input_factor", 4)),
        output_factor=float(_setting(settings, "adaptive_softmax_factor", 4)),
        tie_word_embeddings=shared if softmax_cutoffs is None else tied_bands,
        tie_projections=bool(_setting(settings, "tie_adaptive_proj", tie_projections)),
        scale_embeddings=not settings.get("no_scale_embedding"),
        final_norm=_has_final_norm(tensors),
        dropout=float(_setting(settings, "dropout", 0.1)),
        attention_dropout=float(_setting(settings, "attention_dropout", 0.0)),
        activation_dropout=float(activation_dropout),
        adaptive_dropout=float(_setting(settings, "adaptive_softmax_dropout", 0.0)),
    )


def settings_of(config: AdaptiveConfig) -> dict[str, Any]:
    """What ``args`` of a checkpoint say for this configuration."""
    bands = config.output_cutoffs is not None
    activations = {own: name for name, own in _ACTIVATIONS.items()}
    return {
        "arch": "transformer_lm",
        "task": "language_modeling",
        "decoder_embed_dim": config.hidden_size,
        "decoder_input_dim": config.hidden_size,
        "decoder_output_dim": config.hidden_size,
        "decoder_ffn_embed_dim": config.intermediate_size,
        "decoder_layers": config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_normalize_before": True,
        "no_decoder_final_norm": not config.final_norm,
        "tokens_per_sample": config.max_position_embeddings,
        "max_target_positions": config.max_position_embeddings,
        "activation_fn": activations[config.hidden_act],
        "adaptive_input": config.input_cutoffs is not None,
        "adaptive_input_cutoff": _joined(config.input_cutoffs),
        "adaptive_input_factor": config.input_factor,
        "adaptive_softmax_cutoff": _joined(config.output_cutoffs),
        "adaptive_softmax_factor": config.output_factor,
        "adaptive_softmax_dropout": config.adaptive_dropout,
        "tie_adaptive_weights": bands and config.tie_word_embeddings,
        "tie_adaptive_proj": bands and config.tie_projections,
        "share_decoder_input_output_embed": not bands and config.tie_word_embeddings,
        "no_scale_embedding": not config.scale_embeddings,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout,
    }


def _has_final_norm(tensors: Mapping[str, Tensor]) -> bool:
    # versions up to 2 have the tensors but do not use them
    version = tensors.get(f"{PREFIX}version")
    used = version is not None and float(version.flatten()[0]) > 2
    return used and f"{PREFIX}layer_norm.weight" in tensors


def _vocabulary(tensors: Mapping[str, Tensor]) -> int:
    plain = tensors.get(f"{PREFIX}embed_tokens.weight")
    if plain is not None:
        return len(plain)
    table = re.compile(re.escape(PREFIX) + r"embed_tokens\.embeddings\.\d+\.0\.weight")
    sizes = [len(tensor) for name, tensor in tensors.items() if table.fullmatch(name)]
    check(
        bool(sizes),
        f"a language model of fairseq must have word vectors under {PREFIX}embed_tokens, but this "
        f"checkpoint has {sorted(tensors)[:3]} ...; is it a decoder?",
    )
    return sum(sizes)


def _setting(settings: Mapping[str, Any], name: str, default: Any) -> Any:
    value = settings.get(name)
    return default if value is None else value


def _cutoffs(value: Any) -> list[int] | None:
    return None if not value else [int(part) for part in str(value).split(",")]


def _joined(cutoffs: list[int] | None) -> str | None:
    return None if cutoffs is None else ",".join(str(cutoff) for cutoff in cutoffs)
