"""What a TUPE encoder predicts: masked tokens, a class, a class per token, the next token.

    masked tokens   logits = LN(act(W h)) E^T + b                  E: the word embeddings
    a sample        logits = W_2 drop(tanh(W_1 h_0)) + b_2         one label: regression

Losses are mean negative log-likelihoods in nats over the predicted tokens or samples (mean squared
error for regression), or sums divided by ``num_items_in_batch`` where the Trainer gives it, so that
gradient accumulation equals one large batch. A batch without any masked token has loss 0. In
training, masked-token logits are made for the masked positions only, ``(masked, vocab)``.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    Cache,
    GenerationMixin,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from memlm.core.config import check
from memlm.models.tupe.config import TupeConfig, as_decoder, labels_of
from memlm.models.tupe.encoder import HeadLinear, TupeModel, TupePreTrainedModel
from memlm.models.tupe.tokenizer import TupeTokenizer

_IGNORED = -100
_TIED = {"lm_head.decoder.weight": "tupe.embeddings.word_embeddings.weight"}


class TupeLMHead(nn.Module):
    """Hidden states to scores of the vocabulary; its matrix is that of the word embeddings."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., vocab)``."""
        return self.decoder(self.layer_norm(self.activation(self.dense(hidden))))


class _WithLMHead(TupePreTrainedModel):
    _tied_weights_keys = _TIED

    def __init__(self, config: TupeConfig):
        super().__init__(config)
        self.tupe = TupeModel(config)
        self.lm_head = TupeLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The layer that makes the logits."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the layer that makes the logits."""
        self.lm_head.decoder = new_embeddings  # type: ignore[assignment]


class TupeForMaskedLM(_WithLMHead):
    """Predicts masked tokens: what TUPE is pre-trained for."""

    def __init__(self, config: TupeConfig):
        super().__init__(as_decoder(config, False))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Encode and score.

        Args:
            input_ids: ``(batch, time)``, with masks.
            attention_mask: see `TupeModel.forward`, as for all others.
            position_ids: likewise.
            labels: ``(batch, time)`` original tokens, -100 where nothing is predicted.
            num_items_in_batch: what the summed loss is divided by; default: predicted tokens.
            kwargs: handed on to the encoder.
        """
        output = self.tupe(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        hidden, loss = output.last_hidden_state, None
        if labels is not None:
            chosen = labels != _IGNORED
            if self.training:
                hidden, labels = hidden[chosen], labels[chosen]
            logits = self.lm_head(hidden)
            loss = _token_loss(logits, labels, num_items_in_batch)
        else:
            logits = self.lm_head(hidden)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TupeForCausalLM(_WithLMHead, GenerationMixin):
    """Predicts the next token, with untied positions: all relative buckets are for the past."""

    def __init__(self, config: TupeConfig):
        super().__init__(as_decoder(config, True))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Decode and score.

        Args:
            input_ids: ``(batch, time)``.
            attention_mask: ``(batch, past + time)``; padding on either side.
            position_ids: of all tokens, or counting on.
            past_key_values: of the tokens before.
            labels: ``(batch, time)`` like ``input_ids``, shifted here; -100 is not scored.
            logits_to_keep: only so many last rows of logits.
            num_items_in_batch: what the summed loss is divided by; default: predicted tokens.
            kwargs: handed on to the encoder.
        """
        kwargs["past_key_values"] = past_key_values
        output = self.tupe(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            following = F.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
            loss = _token_loss(logits, following, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TupeSentenceHead(nn.Module):
    """The first token's state to labels."""

    def __init__(self, config: TupeConfig):
        super().__init__()
        self.dense = HeadLinear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.classifier_act]
        self.dropout = config.classifier_dropout
        self.out_proj = HeadLinear(config.hidden_size, labels_of(config))

    def forward(self, hidden: Tensor) -> Tensor:
        """``(batch, time, dim)`` to ``(batch, labels)``."""
        pooled = self.activation(self.dense(hidden[:, 0]))
        return self.out_proj(F.dropout(pooled, self.dropout, self.training))


class TupeForSequenceClassification(TupePreTrainedModel):
    """Predicts one label of a sample; with ``num_labels=1`` a number."""

    def __init__(self, config: TupeConfig):
        config = as_decoder(config, False)
        super().__init__(config)
        self.tupe = TupeModel(config)
        self.classifier = TupeSentenceHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Encode and classify; ``labels`` ``(batch,)`` are class numbers, or numbers to predict."""
        output = self.tupe(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        logits = self.classifier(output.last_hidden_state)
        loss = None
        if labels is not None:
            labels = labels.reshape(-1)
            if labels_of(self.config) == 1:
                check(
                    labels.is_floating_point(),
                    f"labels of a regression must be floating-point numbers, got {labels.dtype}",
                )
                loss = ((logits[:, 0].float() - labels.float()) ** 2).sum()
            else:
                _check_classes(labels, labels_of(self.config))
                loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class TupeForTokenClassification(TupePreTrainedModel):
    """Predicts one label of every token."""

    def __init__(self, config: TupeConfig):
        config = as_decoder(config, False)
        super().__init__(config)
        self.tupe = TupeModel(config)
        self.dropout = config.classifier_dropout
        self.classifier = HeadLinear(config.hidden_size, labels_of(config))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Encode and classify; ``labels`` ``(batch, time)``, -100 is not scored."""
        output = self.tupe(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        logits = self.classifier(F.dropout(output.last_hidden_state, self.dropout, self.training))
        loss = None
        if labels is not None:
            _check_classes(labels[labels != _IGNORED], labels_of(self.config))
            loss = _token_loss(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def _token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    total = F.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=_IGNORED, reduction="sum"
    )
    return total / ((labels != _IGNORED).sum().clamp(min=1) if items is None else items)


def _check_classes(labels: Tensor, classes: int) -> None:
    if labels.numel():
        largest = int(labels.max())
        check(
            largest < classes and int(labels.min()) >= 0,
            f"labels must be class numbers in [0, {classes}), got {largest}; set num_labels",
        )


AutoModelForMaskedLM.register(TupeConfig, TupeForMaskedLM, exist_ok=True)
AutoModelForCausalLM.register(TupeConfig, TupeForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    TupeConfig, TupeForSequenceClassification, exist_ok=True
)
AutoModelForTokenClassification.register(TupeConfig, TupeForTokenClassification, exist_ok=True)
AutoTokenizer.register(TupeConfig, slow_tokenizer_class=TupeTokenizer, exist_ok=True)
