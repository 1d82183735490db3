"""The configuration of a language model that was taught to read neighbours (RETRO-fit)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from memlm.core.config import check
from memlm.models.config import AroundConfig
from memlm.models.retro.config import RetroConfig

# What of a `RetroConfig` only its own decoder has.
_OF_THE_DECODER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "shared_embeddings",
    "learned_positions",
    "max_position_embeddings",
    "norm_first",
    "deepnet",
    "encoder_residual_scale",
    "decoder_residual_scale",
    "compatibility",
    "head_bias",
    "tie_word_embeddings",
)


class RetroFitConfig(AroundConfig):
    """How a ``RetroFitForCausalLM`` is put together.

    Attributes:
        text_config: the base model's configuration.
        base: where its weights are; see `memlm.models.config.AroundConfig`.
        retro: of the new parts: encoder, cross-attention, chunks.
    """

    model_type = "memlm_retro_fit"

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        retro: RetroConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(text_config, base, **kwargs)
        self.retro = RetroConfig(**retro) if isinstance(retro, dict) else retro


def fit_settings(base: PreTrainedConfig, **changes: Any) -> RetroConfig:
    """The new parts for a base model, in its width unless said otherwise.

    Args:
        base: configuration of its decoder.
        changes: fields of `RetroConfig`, but not those of the decoder.

    Raises:
        InputError: for a field that the base model decides, or a value out of range.
    """
    refused = sorted(set(changes) & set(_OF_THE_DECODER))
    check(not refused, f"the base model decides {', '.join(refused)}; leave that out")
    heads, width, depth = base.num_attention_heads, base.hidden_size, base.num_hidden_layers
    head = max(2, width // heads // 2 * 2)  # rotary positions turn pairs
    if changes.get("cross_attention_layers") is None and depth < 6:
        changes["cross_attention_layers"] = (depth // 2 + 1,)
    own = {
        "num_attention_heads": heads,
        "head_dim": head,
        "encoder_hidden_size": width,
        "pad_token_id": base.pad_token_id,
        "initializer": "torch",  # by width: beside a trained model N(0, 0.02) is hardly heard
    }
    return RetroConfig(
        **{**own, **changes},
        vocab_size=base.vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        shared_embeddings=True,
    )


AutoConfig.register(RetroFitConfig.model_type, RetroFitConfig, exist_ok=True)
