"""The decoder of TRIME's language models, and fairseq's plain ``transformer_lm``.

    x = sqrt(C) e(w) + s(position)                 e: embedding, s: sinusoids [sin | cos]
    x = x + attention(norm(x));  x = x + W2 relu(W1 norm(x))       per layer, norm first
    f = x, or norm(x) with a final norm            f: what the head reads

The memory key is what enters W1 of the last layer (tap ``ffn_input``; the papers' code calls it
``last_ffn_input``). Sinusoids follow fairseq: the first token has position 2, rows are
``[sin(p w_j) | cos(p w_j)]`` with ``w_j = 10000^(-j / (C/2 - 1))``, one zero more if C is odd.

Sources: Vaswani et al. (2017); Baevski and Auli (2019); TRIME (Zhong et al. 2022), appendix A.
Differs from fairseq: a position is counted from the attention mask, not from padding tokens; there
is no dropout of whole layers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from memlm.core.config import check
from memlm.core.errors import UnsupportedModelError
from memlm.data.batches import IGNORED
from memlm.models.adaptive.config import AdaptiveConfig
from memlm.models.adaptive.embedding import PAD, AdaptiveEmbedding
from memlm.models.adaptive.head import AdaptiveHead
from memlm.models.head import Head

_FIRST_POSITION = 2  # fairseq counts from the padding token's id + 1


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Rows ``[sin | cos]`` of any positions.

    Args:
        positions: ``(...)`` integers, 0 for the first token of a text.
        dim: width of a row.

    Returns:
        ``(..., dim)`` float32.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequencies = torch.exp(steps * -(math.log(10000) / (half - 1)))
    angles = (positions + _FIRST_POSITION).float()[..., None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights; ``(batch, heads, time, head_dim)`` each."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class AttentionInput(nn.Linear):
    """Makes queries, keys or values; a class of its own for its initial values."""


class PlainHead(nn.Linear):
    """Scores of words without bands; alike."""


class AdaptiveAttention(nn.Module):
    """Causal self-attention with biases everywhere."""

    def __init__(self, config: AdaptiveConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.layer_idx = layer
        self.is_causal = True
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = AttentionInput(width, width)
        self.k_proj = AttentionInput(width, width)
        self.v_proj = AttentionInput(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``(batch, time, dim)`` to the same, and the weights where they are known."""
        query, key, value = (
            part(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "sdpa", eager_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, weights = attention(
            self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.out_proj(mixed.flatten(2)), weights


class AdaptiveLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each after its norm and beside its residual."""

    def __init__(self, config: AdaptiveConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self.activation = ACT2FN[config.hidden_act]
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.self_attn = AdaptiveAttention(config, layer)
        self.ffn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``(batch, time, dim)`` to the same."""
        mixed, _ = self.self_attn(
            self.self_attn_layer_norm(hidden), mask, past_key_values, **kwargs
        )
        hidden = hidden + F.dropout(mixed, self.dropout, self.training)
        inner = self.activation(self.fc1(self.ffn_layer_norm(hidden)))
        inner = self.fc2(F.dropout(inner, self.activation_dropout, self.training))
        return hidden + F.dropout(inner, self.dropout, self.training)


class AdaptivePreTrainedModel(PreTrainedModel):
    """What both classes share: loading, saving and fairseq's initial values."""

    config: AdaptiveConfig
    config_class = AdaptiveConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["AdaptiveLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": AdaptiveLayer,
        "attentions": AdaptiveAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # by leaves: transformers skips modules without weights of their own
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            # a slice does not carry the mark of weights that were loaded
            loaded = getattr(module.weight, "_is_hf_initialized", False)
            if module.num_embeddings > PAD and not loaded:
                init.zeros_(module.weight[PAD])
        elif isinstance(module, PlainHead):
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, AttentionInput):
            init.xavier_uniform_(module.weight, gain=2**-0.5)
            bound = module.in_features**-0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class AdaptiveModel(AdaptivePreTrainedModel):
    """The body: tokens to final hidden states."""

    def __init__(self, config: AdaptiveConfig):
        super().__init__(config)
        width = config.hidden_size
        if config.input_cutoffs is None:
            self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, width, padding_idx=PAD)
        else:
            self.embed_tokens = AdaptiveEmbedding(config.input_bands, width)
        self.layers = nn.ModuleList(
            AdaptiveLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width) if config.final_norm else nn.Identity()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: ``(batch, time)`` int64.
            attention_mask: ``(batch, past + time)``, 0 for padding on either side.
            position_ids: ``(batch, time)``, 0 for the first token of a text; default: counted
                from the mask.
            past_key_values: keys and values of tokens read before.
            inputs_embeds: ``(batch, time, dim)`` instead of ``input_ids``, not scaled yet.
            use_cache: return keys and values.
            kwargs: for the attention function.

        Raises:
            InputError: if not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        check(
            (input_ids is None) != (inputs_embeds is None),
            "exactly one of input_ids and inputs_embeds must be given, got "
            f"{'none' if input_ids is None else 'both'}",
        )
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = _positions(attention_mask, read, hidden.shape[1], hidden.device)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        if self.config.scale_embeddings:
            hidden = hidden * math.sqrt(self.config.hidden_size)
        hidden = hidden + sinusoids(position_ids, hidden.shape[-1]).to(hidden.dtype)
        hidden = F.dropout(hidden, self.config.dropout, self.training)
        for layer in self.layers:
            hidden = layer(hidden, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )


def _positions(mask: Tensor | None, read: int, time: int, device: torch.device) -> Tensor:
    """``(batch or 1, time)`` places of tokens in their text, 0 first; anything at padding."""
    if mask is None or mask.ndim != 2:
        return torch.arange(read, read + time, device=device)[None]
    return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -time:]


class AdaptiveForCausalLM(AdaptivePreTrainedModel, GenerationMixin):
    """The decoder with its head: scores of the next word."""

    def __init__(self, config: AdaptiveConfig):
        super().__init__(config)
        self.model = AdaptiveModel(config)
        if config.output_cutoffs is None:
            self.lm_head: nn.Module = PlainHead(config.hidden_size, config.vocab_size, bias=False)
        else:
            self.lm_head = AdaptiveHead(
                config.output_bands, config.hidden_size, config.adaptive_dropout
            )
        # of the object, since it depends on the number of bands
        self._tied_weights_keys = _tied(config)
        self.post_init()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, for a model without bands.

        Raises:
            UnsupportedModelError: if the vocabulary is cut into bands.
        """
        if self.config.input_cutoffs is None and self.config.output_cutoffs is None:
            return super().resize_token_embeddings(*args, **kwargs)
        raise UnsupportedModelError(
            "only a model with one plain table of words can change their number, but this one has "
            f"bands {self.config.input_cutoffs or self.config.output_cutoffs}; train a new model"
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run body and head.

        Args:
            input_ids: as for `AdaptiveModel`, like the other inputs of the body.
            attention_mask: alike.
            position_ids: alike.
            past_key_values: alike.
            inputs_embeds: alike.
            labels: ``(batch, time)`` int64, moved by one inside; -100 is not scored.
            use_cache: alike.
            logits_to_keep: how many last positions get logits, or which; 0: all.
            num_items_in_batch: what the summed loss is divided by; default: its own targets.
            kwargs: for the body.

        Returns:
            Mean negative log-likelihood in nats as ``loss``, made without rows of the whole
            vocabulary, and ``(batch, kept, vocabulary)`` unnormalised log-scores as ``logits``,
            None in training mode with labels.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if labels is not None:
            counted = labels[:, 1:] != IGNORED
            said = Head(self.lm_head).target(hidden[:, :-1][counted], labels[:, 1:][counted])
            count = counted.sum() if num_items_in_batch is None else num_items_in_batch
            loss = (said.lse - said.target_lse).sum() / count
        if labels is None or not self.training:
            logits = self.lm_head(slice_logits_to_keep(hidden, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _tied(config: AdaptiveConfig) -> dict[str, str]:
    """Which weights of the head are which of the embedding."""
    if not config.tie_word_embeddings:
        return {}
    if config.output_cutoffs is None:
        return {"lm_head.weight": "model.embed_tokens.weight"}
    head, embedding = "lm_head", "model.embed_tokens"
    pairs = {f"tables.{band}": f"tables.{band}" for band in range(len(config.output_bands))}
    if config.tie_projections:
        # the head needs none for the first band
        pairs |= {
            f"projections.{band - 1}": f"projections.{band}"
            for band in range(1, len(config.output_bands))
        }
    return {f"{head}.{own}.weight": f"{embedding}.{source}.weight" for own, source in pairs.items()}


AutoModel.register(AdaptiveConfig, AdaptiveModel, exist_ok=True)
AutoModelForCausalLM.register(AdaptiveConfig, AdaptiveForCausalLM, exist_ok=True)
