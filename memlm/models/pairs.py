"""Encoder-decoder models, read with known targets."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.errors import UnsupportedModelError
from memlm.data.pairs import PairBatch
from memlm.models.running import device_of


def encode(model: PreTrainedModel, batch: PairBatch) -> dict[str, Tensor]:
    """What the decoder needs of the sources: their states and mask, as its keyword arguments.

    Raises:
        UnsupportedModelError: if the model has no encoder.
    """
    check_encoder_decoder(model)
    device = device_of(model)
    mask = batch.attention_mask.to(device)
    encoder: Any = model.get_encoder()
    states = encoder(input_ids=batch.input_ids.to(device), attention_mask=mask).last_hidden_state
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def decoder_inputs(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Labels ``(rows, target)`` shifted to the right, behind the start token."""
    shift: Any = model.prepare_decoder_input_ids_from_labels
    return shift(labels=labels.to(device_of(model)))


def check_encoder_decoder(model: PreTrainedModel) -> None:
    """Refuse a model that is none.

    Raises:
        UnsupportedModelError: if it has no encoder, or cannot shift labels.
    """
    fits = hasattr(model, "prepare_decoder_input_ids_from_labels")
    if not (model.config.is_encoder_decoder and fits):
        raise UnsupportedModelError(
            f"pairs need an encoder-decoder model, such as Marian, T5 or BART, got "
            f"{type(model).__name__}; load it with AutoModelForSeq2SeqLM"
        )
