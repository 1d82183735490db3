"""The configuration of TUPE models: a BERT-like encoder and one switch for its positions.

Defaults are the published base model (Ke et al. 2021, section 4.1; 112 M parameters with 32,769
tokens). Differs from BERT: LayerNorm's eps is 1e-5, there are no segments, and the classification
head keeps the initialisation of torch's layers, as the authors' code has it.
"""

import copy
from typing import Any, Literal, cast

from transformers import AutoConfig, PreTrainedConfig

from memlm.core.config import check
from memlm.positions.buckets import check_buckets
from memlm.positions.scheme import PositionScheme
from memlm.positions.untied import check_extension, check_heads

Size = Literal["tiny", "base", "large"]

_SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 512,
    },
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}


class TupeConfig(PreTrainedConfig):
    """A TUPE model's shape; what is not listed is as in BERT's configuration.

    Attributes:
        scheme: name of one of the six position schemes, or the dictionary of a `PositionScheme`.
        max_position_embeddings: trained positions.
        position_extension: beyond them: ``"error"``, ``"interpolate"`` or ``"clip"``.
        num_buckets: of the relative part.
        max_distance: of the relative part.
        embedding_norm: LayerNorm on the embeddings.
        norm_first: LayerNorm before attention and feed-forward (and at the end) instead of after.
        activation_dropout: inside the feed-forward.
        classifier_dropout: inside the classification head.
        classifier_act: likewise, the activation.
        is_decoder: attend to the past only; `TupeForCausalLM` sets it, the other heads unset it.
        head_init: of the classification head: ``"torch"`` (the authors') or ``"normal"``.
    """

    model_type = "tupe"

    vocab_size: int = 32769
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.1
    classifier_act: str = "tanh"
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    use_cache: bool = True
    scheme: str | dict[str, Any] = "tupe-a"
    position_extension: str = "error"
    num_buckets: int = 32
    max_distance: int = 128
    embedding_norm: bool = True
    norm_first: bool = False
    is_decoder: bool = False
    head_init: str = "torch"

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        check_heads(self.hidden_size, self.num_attention_heads)
        check_extension(self.position_extension)
        check(
            self.head_init in ("torch", "normal"),
            f"head_init must be 'torch' or 'normal', got {self.head_init!r}",
        )
        if self.position_scheme.relative:
            check_buckets(self.num_buckets, self.max_distance, bidirectional=True)

    @property
    def position_scheme(self) -> PositionScheme:
        """What ``scheme`` names."""
        if isinstance(self.scheme, str):
            return PositionScheme.named(self.scheme)
        return PositionScheme.from_dict(self.scheme)

    @classmethod
    def preset(cls, size: Size, scheme: str = "tupe-a", **changes: Any) -> "TupeConfig":
        """The configuration of a size and a scheme.

        Args:
            size: ``"tiny"`` (2 layers of width 128), ``"base"`` or ``"large"`` (the paper's).
            scheme: one of the six names.
            changes: other fields.

        Raises:
            InputError: for an unknown size or scheme.
        """
        check(size in _SIZES, f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        return cls(**{**_SIZES[size], "scheme": scheme, **changes})


def as_decoder(config: TupeConfig, decoder: bool) -> TupeConfig:
    """The configuration itself if it says so, else a copy that does."""
    if config.is_decoder == decoder:
        return config
    changed = copy.deepcopy(config)
    changed.is_decoder = decoder
    return changed


def labels_of(config: TupeConfig) -> int:
    """Number of labels; 1: regression."""
    return cast(int, config.num_labels)


def with_labels(config: TupeConfig, labels: int) -> TupeConfig:
    """The same model with another number of labels (1: regression)."""
    values = config.to_dict()
    for name in ("id2label", "label2id", "num_labels"):
        values.pop(name, None)
    return TupeConfig(**{**values, "num_labels": labels})


AutoConfig.register("tupe", TupeConfig, exist_ok=True)
