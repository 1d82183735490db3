"""The TUPE encoder: position terms are made once and handed to every layer.

    x = LayerNorm(embedding);  P = positions(length)
    layer: x = LN(x + attention(x, P));  x = LN(x + W_2 act(W_1 x))        (or norm first)

(Ke et al. 2021.) The same class is the baselines of the paper, by `TupeConfig.scheme`. As a decoder
it attends to the past only; keys are cached without positions, which are scored apart, so any
position ids may be used with a cache.

Padding rows are computed and mean nothing. Differs from the authors' code: hidden states are always
``(batch, time, dim)``, the last one after the final norm; the attention mask is read; positions may
be given; left padding, a row of padding and over-long rows are errors instead of wrong numbers.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from memlm.core.config import check
from memlm.models.tupe.config import TupeConfig
from memlm.ops.untied_attention import (
    Impl,
    PositionTerms,
    Sight,
    reference_attention,
    untied_attention,
)
from memlm.positions.ids import check_padding, position_ids_of
from memlm.positions.untied import Extension, UntiedPositions

_IMPLEMENTATIONS: dict[str, Impl] = {
    "eager": "reference",
    "sdpa": "folded",
    "flex_attention": "flex",
}


class _Run(NamedTuple):
    """What one forward pass hands to every layer."""

    terms: PositionTerms | None
    sight: Sight
    cache: Cache | None
    with_weights: bool


class HeadLinear(nn.Linear):
    """A layer of a classification head, which the authors initialise as torch does."""


class TupeEmbeddings(nn.Module):
    """Token embeddings, with positions added only in the schemes that add them."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, config.pad_token_id)
        if config.position_scheme.absolute == "added":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        if config.embedding_norm:
            self.layer_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.extension = config.position_extension
        self.dropout = config.hidden_dropout_prob

    def forward(self, embedded: Tensor, position_ids: Tensor, valid: Tensor | None) -> Tensor:
        """From word vectors ``(batch, time, dim)`` to the first layer's input."""
        x = embedded
        if hasattr(self, "position_embeddings"):
            table = self.position_embeddings.weight
            longest = int(position_ids.max()) + 1 if position_ids.numel() else 0
            if longest > len(table) and self.extension == "interpolate":
                table = F.interpolate(
                    table.T[None], size=longest, mode="linear", align_corners=True
                )[0].T
            check(
                longest <= len(table) or self.extension == "clip",
                f"sequence length {longest} exceeds max_positions {len(table)}; pass "
                "position_extension='interpolate' or 'clip'",
            )
            x = x + table[position_ids.clamp(max=len(table) - 1)]
        if hasattr(self, "layer_norm"):
            x = self.layer_norm(x)
        x = F.dropout(x, self.dropout, self.training)
        return x if valid is None else x * valid[:, -x.shape[1] :, None]


class TupeAttention(nn.Module):
    """Multi-head attention over content, plus the position terms."""

    def __init__(self, config: TupeConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer = layer
        self.heads = config.num_attention_heads
        self.crossed = config.position_scheme.absolute == "crossed"
        self.scale = (config.position_scheme.terms * (width // self.heads)) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, run: _Run) -> tuple[Tensor, Tensor | None]:
        """The attended values, and the weights if they were asked for."""
        query, key, value = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if run.cache is not None:
            key, value = run.cache.update(key, value, self.layer)
        terms = run.terms
        if self.crossed and terms is not None:
            place_query, place_key = cast(Tensor, terms.query), cast(Tensor, terms.key)
            query = query + place_query[:, :, -query.shape[2] :]
            key = key + place_key
            terms = None
        arguments: dict[str, Any] = {
            "scale": self.scale,
            "sight": run.sight,
            "dropout": self.dropout if self.training else 0.0,
        }
        weights = None
        if run.with_weights:
            mixed, weights = reference_attention(query, key, value, terms, **arguments)
        else:
            impl = _IMPLEMENTATIONS[self.config._attn_implementation or "sdpa"]
            mixed = untied_attention(query, key, value, terms, **arguments, impl=impl)
        return self.output(mixed.transpose(1, 2).flatten(2)), weights


class TupeLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with its residual and norm."""

    def __init__(self, config: TupeConfig, layer: int):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm_first = config.norm_first
        self.dropout = config.hidden_dropout_prob
        self.activation_dropout = config.activation_dropout
        self.attention = TupeAttention(config, layer)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.activation = ACT2FN[config.hidden_act]
        self.expand = nn.Linear(width, config.intermediate_size)
        self.contract = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, run: _Run) -> tuple[Tensor, Tensor | None]:
        """``(batch, time, dim)`` to the same, and the attention weights if asked for."""
        mixed, weights = self.attention(self.attention_norm(x) if self.norm_first else x, run)
        x = x + F.dropout(mixed, self.dropout, self.training)
        if not self.norm_first:
            x = self.attention_norm(x)
        hidden = self.activation(self.expand(self.output_norm(x) if self.norm_first else x))
        hidden = self.contract(F.dropout(hidden, self.activation_dropout, self.training))
        x = x + F.dropout(hidden, self.dropout, self.training)
        return (x if self.norm_first else self.output_norm(x)), weights


class TupePreTrainedModel(PreTrainedModel):
    """What all TUPE models share: loading, saving and initialisation."""

    config: TupeConfig
    config_class = TupeConfig
    base_model_prefix = "tupe"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["TupeLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HeadLinear) and self.config.head_init == "torch":
            init.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class TupeModel(TupePreTrainedModel):
    """The encoder: tokens to hidden states. Row 0 of a sample represents it.

    With ``config.is_decoder`` it attends to the past only, as under `TupeForCausalLM`.
    """

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        scheme = config.position_scheme
        self.causal = config.is_decoder
        self.embeddings = TupeEmbeddings(config)
        if scheme.relative or scheme.absolute in ("untied", "crossed"):
            self.position_bias = UntiedPositions(
                config.hidden_size,
                config.num_attention_heads,
                scheme,
                max_positions=config.max_position_embeddings,
                bidirectional=not self.causal,
                num_buckets=config.num_buckets,
                max_distance=config.max_distance,
                layer_norm_eps=config.layer_norm_eps,
                extension=_extension(config),
            )
        self.layers = nn.ModuleList(TupeLayer(config, i) for i in range(config.num_hidden_layers))
        if config.norm_first:
            self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        untied_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        visible: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the encoder.

        Args:
            input_ids: ``(batch, time)``.
            attention_mask: ``(batch, time)``, 0 for padding; with a cache, of past tokens too.
                Default for an encoder: what is not the padding token.
            position_ids: ``(batch or 1, time)``; default: columns, counted anew in every document
                of ``document_ids`` (for a decoder over unpadded tokens).
            untied_mask: ``(batch or 1, time)`` bool, tokens that see no positions; default those at
                position 0.
            document_ids: ``(batch, time)``: tokens see only their own document (packing).
            visible: ``(batch or 1, 1, time, time)`` bool, any other rule (prefix LM).
            inputs_embeds: ``(batch, time, dim)`` instead of ``input_ids``.
            past_key_values: of a decoder.
            use_cache: of a decoder.
            output_attentions: also return ``(batch, heads, time, time)`` weights of every layer.
            output_hidden_states: also return the input of every layer and the last output.

        Raises:
            InputError: for a token outside the vocabulary, padding on the left without
                ``position_ids`` (encoders), a row of padding, or too long a row.
        """
        embedded, valid = self._read(input_ids, attention_mask, inputs_embeds)
        use_cache = self.causal and (self.config.use_cache if use_cache is None else use_cache)
        if use_cache and not self.training and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = past + embedded.shape[1]
        positions = self._positions(position_ids, valid, document_ids, past, length)
        if valid is not None and bool(valid.all()):
            valid = None
        columns = torch.arange(length, device=embedded.device)[None]
        own = (columns if positions is None else positions)[:, past:]
        x = self.embeddings(embedded, own, valid)
        terms = None
        if hasattr(self, "position_bias"):
            terms = self.position_bias(length, position_ids=positions, untied=untied_mask)
        run = _Run(
            terms,
            Sight(valid, document_ids, self.causal, visible),
            past_key_values,
            bool(self._wanted("output_attentions", output_attentions)),
        )
        wanted = self._wanted("output_hidden_states", output_hidden_states)
        states, weights = [x], []
        for layer in self.layers:
            x, weight = layer(x, run)
            states.append(x)
            weights.append(weight)
        if self.config.norm_first:
            x = states[-1] = self.final_norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if wanted else None,  # type: ignore[arg-type]
            attentions=tuple(weights) if run.with_weights else None,  # type: ignore[arg-type]
        )

    def _wanted(self, name: str, given: bool | None) -> bool:
        return bool(getattr(self.config, name, False) if given is None else given)

    def _read(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, embeds: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Word vectors and which tokens are real."""
        check(
            (input_ids is None) != (embeds is None),
            "exactly one of input_ids and inputs_embeds must be given",
        )
        if embeds is None and input_ids is not None:
            size = self.embeddings.word_embeddings.num_embeddings
            check(
                input_ids.numel() > 0, f"the batch must hold tokens, got {tuple(input_ids.shape)}"
            )
            largest = int(input_ids.max())
            check(
                largest < size and int(input_ids.min()) >= 0,
                f"token ids must be in [0, {size}), got {largest}; is it this model's tokenizer?",
            )
            embeds = self.embeddings.word_embeddings(input_ids)
            pad = self.config.pad_token_id
            if attention_mask is None and not self.causal and pad is not None:
                attention_mask = input_ids != pad
        check(
            attention_mask is None or attention_mask.dim() == 2,
            "attention_mask must be (batch, time); give other rules as visible=",
        )
        return embeds, None if attention_mask is None else attention_mask.bool()  # type: ignore

    def _positions(
        self,
        given: Tensor | None,
        valid: Tensor | None,
        documents: Tensor | None,
        past: int,
        length: int,
    ) -> Tensor | None:
        """Positions of all tokens, past ones too; None for 0, 1, 2, ... in every row."""
        if given is not None and given.shape[-1] == length:
            return given
        if valid is not None and not self.causal and given is None:
            check_padding(valid)
        if documents is not None:
            found = position_ids_of(
                torch.ones_like(documents) if valid is None else valid, documents
            )
        elif valid is not None and self.causal and not bool(valid.all()):
            found = position_ids_of(valid)
        else:
            found = None
        if given is not None:
            columns = torch.arange(past, length, device=given.device)[None]
            check(
                torch.equal(*torch.broadcast_tensors(given, _last(found, columns))),
                "position_ids must be of all tokens, those in the cache too, unless they count on "
                "from them",
            )
        return found


def _last(found: Tensor | None, columns: Tensor) -> Tensor:
    return columns if found is None else found[:, -columns.shape[1] :]


def _extension(config: TupeConfig) -> Extension:
    return config.position_extension  # type: ignore[return-value]  # checked by the configuration


AutoModel.register(TupeConfig, TupeModel, exist_ok=True)
