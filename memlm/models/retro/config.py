"""The configuration of RETRO models (Borgeaud et al. 2022; DeepNet: Wang et al. 2022).

Defaults are the paper's choices where it has one: RMSNorm before every sub-layer, chunks of 64,
cross-attention every third layer from 6 (from 9 in deep models), the encoder conditioned in its
first layer, embeddings of their own for the encoder. Positions are rotary instead of the paper's
relative ones, aligned as the paper aligns them; a learnt null key is added to cross-attention, so
that there is something to attend to where nothing was retrieved.

``compatibility="retro_pytorch"`` is the one switch for what the published package computes
differently (see `docs/retro.md`): queries of cross-attention are rotated as if all but the first of
a chunk stood at position 0, and models with norms behind the sub-layers leave out the norm of
cross-attention where there is no retrieval. Its checkpoints were trained so and need it.
"""

from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from memlm.core.config import check

Norm = Literal["rms", "gated_rms", "layer"]
Size = Literal["172m", "425m", "1.5b", "7.5b"]

_SIZES: dict[str, tuple[int, int, int, int]] = {  # width, layers, heads, head width
    "172m": (896, 12, 16, 64),
    "425m": (1536, 12, 12, 128),
    "1.5b": (2048, 24, 16, 128),
    "7.5b": (4096, 32, 32, 128),
}


class RetroConfig(PreTrainedConfig):
    """A RETRO model's shape. Layers are numbered from 1, as in the paper.

    Attributes:
        hidden_size: width d of the decoder.
        num_hidden_layers: of the decoder.
        num_attention_heads: of decoder and encoder.
        head_dim: width of a head; heads * head_dim need not be the width.
        intermediate_size: of the decoder's feed-forward; None: 4 d.
        encoder_hidden_size: width e of the encoder.
        encoder_num_layers: of the encoder.
        encoder_intermediate_size: None: 4 e.
        chunk_size: tokens per chunk (the paper's m).
        cross_attention_layers: decoder layers that attend to neighbours; None: every third from 6,
            from 9 beyond 15 layers, the middle one below 6 layers; empty: none.
        encoder_cross_attention_layers: encoder layers that attend to the chunk; empty: none, and
            every distinct neighbour is encoded only once.
        shared_embeddings: one table of width e for both, projected for the decoder if d differs.
        learned_positions: add a table of ``max_position_embeddings`` absolute positions.
        max_position_embeddings: rows of that table; without it any length may be read.
        rotary_dim: rotated channels of a head; None: all.
        rope_theta: base of the rotary frequencies.
        norm: ``"rms"``, ``"gated_rms"`` (times ``sigmoid(w x)``) or ``"layer"``.
        norm_first: norms before the sub-layers and one at the end; else behind each residual sum.
        encoder_residual_scale: of x in ``norm(scale x + F(x))``; None: DeepNet's, or 1.
        decoder_residual_scale: alike.
        deepnet: scales and initialisation of DeepNet; needs ``norm_first=False``.
        encoder_attention_dropout: on the encoder's attention weights.
        encoder_activation_dropout: inside its feed-forward.
        attention_dropout: of the decoder, both attentions.
        activation_dropout: inside its feed-forward.
        head_bias: the output layer has a bias.
        initializer: ``"normal"``: N(0, initializer_range); ``"torch"``: torch's own of every layer,
            as in the published package.
        compatibility: ``"none"`` or ``"retro_pytorch"``.
        neighbour_pad_token_id: where no mask is given, neighbour tokens equal to it are padding;
            None: ``pad_token_id``, and if that is None too, all are real.
    """

    model_type = "memlm_retro"

    vocab_size: int = 32000
    hidden_size: int = 896
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    head_dim: int = 64
    intermediate_size: int | None = None
    encoder_hidden_size: int = 896
    encoder_num_layers: int = 2
    encoder_intermediate_size: int | None = None
    chunk_size: int = 64
    cross_attention_layers: list[int] | tuple[int, ...] | None = None
    encoder_cross_attention_layers: list[int] | tuple[int, ...] = (1,)
    shared_embeddings: bool = False
    learned_positions: bool = False
    max_position_embeddings: int = 2048
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    norm: str = "rms"
    norm_first: bool = True
    encoder_residual_scale: float | None = None
    decoder_residual_scale: float | None = None
    deepnet: bool = False
    encoder_attention_dropout: float = 0.0
    encoder_activation_dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    head_bias: bool = False
    initializer: str = "normal"
    initializer_range: float = 0.02
    compatibility: str = "none"
    neighbour_pad_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any):
        if self.cross_attention_layers is None:
            self.cross_attention_layers = _every_third(self.num_hidden_layers)
        self.cross_attention_layers = list(self.cross_attention_layers)
        self.encoder_cross_attention_layers = list(self.encoder_cross_attention_layers)
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.encoder_intermediate_size is None:
            self.encoder_intermediate_size = 4 * self.encoder_hidden_size
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim
        super().__post_init__(**kwargs)
        self._check()

    def _check(self) -> None:
        for name, layers, depth in (
            ("cross_attention_layers", self.cross_attention_layers, self.num_hidden_layers),
            (
                "encoder_cross_attention_layers",
                self.encoder_cross_attention_layers,
                self.encoder_num_layers,
            ),
        ):
            wrong = [layer for layer in layers or () if not 1 <= layer <= depth]
            check(
                not wrong,
                f"{name} must be layer numbers from 1 to {depth}, got {wrong}; number from 1",
            )
        for name in (
            "num_hidden_layers",
            "encoder_num_layers",
            "num_attention_heads",
            "chunk_size",
        ):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        rotary = self.rotary_dim or 0
        check(
            rotary % 2 == 0 and 2 <= rotary <= self.head_dim,
            f"rotary_dim must be even and from 2 to head_dim = {self.head_dim}, got {rotary}",
        )
        for name, choices in (
            ("norm", ("rms", "gated_rms", "layer")),
            ("initializer", ("normal", "torch")),
            ("compatibility", ("none", "retro_pytorch")),
        ):
            value = getattr(self, name)
            check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        check(
            not (self.deepnet and self.norm_first),
            "deepnet must have its norms behind the sub-layers, got norm_first=True; pass "
            "norm_first=False",
        )
        scaled = self.encoder_residual_scale is not None or self.decoder_residual_scale is not None
        check(
            not (scaled and self.norm_first),
            "residual scales must come with norms behind the sub-layers, got norm_first=True; "
            "pass norm_first=False or leave them out",
        )
        check(
            not self.tie_word_embeddings or self.table_size == self.hidden_size,
            f"tied embeddings must be as wide as the decoder, got {self.table_size} and "
            f"{self.hidden_size}; pass tie_word_embeddings=False",
        )

    @property
    def table_size(self) -> int:
        """Width of the decoder's table of word embeddings."""
        return self.encoder_hidden_size if self.shared_embeddings else self.hidden_size

    @property
    def residual_scales(self) -> tuple[float, float]:
        """Factors of x in the residual sums of encoder and decoder (DeepNet, table 1)."""
        n, m = self.encoder_num_layers, self.num_hidden_layers
        own = (0.81 * (n**4 * m) ** (1 / 16), (3 * m) ** (1 / 4)) if self.deepnet else (1.0, 1.0)
        given = self.encoder_residual_scale, self.decoder_residual_scale
        return tuple(a if b is None else b for a, b in zip(own, given, strict=True))  # type: ignore

    @property
    def gains(self) -> tuple[float, float]:
        """DeepNet's gains of values, outputs and feed-forwards of encoder and decoder (table 1)."""
        n, m = self.encoder_num_layers, self.num_hidden_layers
        return 0.87 * (n**4 * m) ** (-1 / 16), (12 * m) ** (-1 / 4)

    @property
    def neighbour_padding(self) -> int | None:
        """The token that is padding in neighbours without a mask."""
        own = self.neighbour_pad_token_id
        return self.pad_token_id if own is None else own

    @classmethod
    def preset(cls, size: Size, **changes: Any) -> "RetroConfig":
        """One of the paper's four models (table 2; sizes include RETRO's parts, not embeddings).

        Args:
            size: ``"172m"``, ``"425m"``, ``"1.5b"`` or ``"7.5b"``.
            changes: other fields.

        Raises:
            InputError: for another size.
        """
        check(size in _SIZES, f"size must be one of {', '.join(_SIZES)}, got {size!r}")
        width, layers, heads, head = _SIZES[size]
        shape = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "head_dim": head,
        }
        return cls(**{**shape, **changes})


def _every_third(depth: int) -> list[int]:
    if depth < 6:
        return [(depth + 1) // 2]
    return list(range(6 if depth <= 15 else 9, depth + 1, 3))


AutoConfig.register("memlm_retro", RetroConfig, exist_ok=True)
