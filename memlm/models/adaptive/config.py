"""The configuration of the adaptive decoder, and the shapes that TRIME published.

Without cutoffs it is fairseq's plain ``transformer_lm``. Token ids 0 to 3 are fairseq's ``<s>``,
``<pad>``, ``</s>`` and ``<unk>``; a text begins with ``</s>``, there is no token of its own for it.
"""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from memlm.core.config import check
from memlm.models.adaptive.bands import Band, make_bands

Preset = Literal["wiki103", "wiki103_150m", "enwik8", "wiki103_small", "wiki103_tiny"]

# TRIME (Zhong et al. 2022, appendix A) and its training scripts; "wiki103_tiny" is the 7 M model of
# its ablations, whose script was not published.
_PRESETS: dict[str, dict[str, Any]] = {
    "wiki103": {},
    "wiki103_150m": {
        "hidden_size": 410,
        "intermediate_size": 2100,
        "num_attention_heads": 10,
        "max_position_embeddings": 150,
        "input_factor": 1.0,
        "output_factor": 1.0,
        "tie_projections": False,
        "adaptive_dropout": 0.0,
        "final_norm": True,
    },
    "enwik8": {
        "vocab_size": 208,
        "hidden_size": 512,
        "num_hidden_layers": 12,
        "intermediate_size": 2048,
        "max_position_embeddings": 512,
        "input_cutoffs": [208],
        "output_cutoffs": [208],
        "input_factor": 1.0,
        "output_factor": 1.0,
        "tie_projections": False,
        "adaptive_dropout": 0.0,
        "final_norm": True,
    },
    "wiki103_small": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048},
    "wiki103_tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
}


class AdaptiveConfig(PreTrainedConfig):
    """A decoder's shape; defaults are the 247 M model for WikiText-103.

    Attributes:
        max_position_embeddings: longest window it was trained with; positions are sinusoids.
        input_cutoffs: bands of the input embedding (see `make_bands`); None: one plain table.
        output_cutoffs: bands of the softmax; None: a plain one.
        input_factor: by which each input band is narrower than the one before.
        output_factor: alike for the softmax.
        tie_word_embeddings: the softmax uses the input's tables.
        tie_projections: and its projections, of all bands but the first.
        scale_embeddings: multiply embeddings by the root of ``hidden_size``.
        final_norm: LayerNorm after the last layer.
        dropout: after embeddings, attention and feed-forward.
        attention_dropout: on attention weights.
        activation_dropout: inside the feed-forward.
        adaptive_dropout: before the bands of the softmax and inside them.
    """

    model_type = "adaptive_lm"

    vocab_size: int = 267744
    hidden_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    intermediate_size: int = 4096
    max_position_embeddings: int = 3072
    hidden_act: str = "relu"
    input_cutoffs: list[int] | None = None
    output_cutoffs: list[int] | None = None
    input_factor: float = 4.0
    output_factor: float = 4.0
    tie_word_embeddings: bool = True
    tie_projections: bool = True
    scale_embeddings: bool = True
    final_norm: bool = False
    dropout: float = 0.3
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    adaptive_dropout: float = 0.2
    bos_token_id: int | None = 2
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        width, heads = self.hidden_size, self.num_attention_heads
        check(
            heads >= 1 and width % heads == 0,
            f"hidden_size must be a multiple of num_attention_heads, got {width} and {heads}",
        )
        check(width >= 4, f"sinusoidal positions need a hidden_size of at least 4, got {width}")
        both = self.input_cutoffs is not None and self.output_cutoffs is not None
        if both and self.tie_word_embeddings:
            check(
                self.input_bands == self.output_bands,
                "tied word embeddings need the same bands in input and softmax, got cutoffs "
                f"{self.input_cutoffs} and {self.output_cutoffs}, factors {self.input_factor} and "
                f"{self.output_factor}",
            )
        elif self.tie_word_embeddings:
            check(
                self.input_cutoffs is None and self.output_cutoffs is None,
                "tied word embeddings need bands on both sides or on none, got cutoffs "
                f"{self.input_cutoffs} and {self.output_cutoffs}; set tie_word_embeddings=False",
            )

    @property
    def input_bands(self) -> list[Band]:
        """Of the input embedding."""
        return self._bands(self.input_cutoffs, self.input_factor)

    @property
    def output_bands(self) -> list[Band]:
        """Of the softmax."""
        return self._bands(self.output_cutoffs, self.output_factor)

    def _bands(self, cutoffs: list[int] | None, factor: float) -> list[Band]:
        return make_bands(self.vocab_size, cutoffs or [], self.hidden_size, factor)

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> "AdaptiveConfig":
        """A published shape.

        Args:
            name: ``"wiki103"`` (247 M parameters), ``"wiki103_150m"``, ``"enwik8"`` (38 M),
                ``"wiki103_small"`` (48 M) or ``"wiki103_tiny"`` (7 M).
            changes: other fields.

        Raises:
            InputError: for an unknown name.
        """
        check(name in _PRESETS, f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        bands = {"input_cutoffs": [20000, 60000], "output_cutoffs": [20000, 60000]}
        return cls(**{**bands, **_PRESETS[name], **changes})


AutoConfig.register("adaptive_lm", AdaptiveConfig, exist_ok=True)
