"""Untie the positions of a trained BERT or RoBERTa, to go on training from there.

Its position vectors p_i become TUPE's, with layer 1's projections: P = p, U_Q = W_Q, U_K = W_K of
layer 1, under the LayerNorm of its embeddings. Content projections and U_Q, U_K grow by
sqrt(2)^(1/2) each, since a score is now scaled by (2 d)^-1/2 instead of d^-1/2. BERT's vector of
segment 0 goes into the token vectors, the reset's rows start at the mean position, bucket biases at
zero. It is a starting point, not the same function: train it further before use. With scheme
``"bert-a"`` it is the same function (logits up to one number per row): the model in this library's
form.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import UnsupportedModelError
from memlm.models.tupe.config import TupeConfig
from memlm.models.tupe.heads import TupeForMaskedLM

_LAYER = (
    ("attention.query", "attention.self.query"),
    ("attention.key", "attention.self.key"),
    ("attention.value", "attention.self.value"),
    ("attention.output", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("expand", "intermediate.dense"),
    ("contract", "output.dense"),
    ("output_norm", "output.LayerNorm"),
)
_HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
             "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
}  # fmt: skip


@torch.no_grad()
def untie_positions(
    model: PreTrainedModel, scheme: str = "tupe-a", **changes: Any
) -> TupeForMaskedLM:
    """A TUPE model that begins where a masked language model ended.

    Args:
        model: a ``BertForMaskedLM`` or ``RobertaForMaskedLM``; not changed.
        scheme: of the new model.
        changes: other fields of its configuration, such as ``position_extension``.

    Raises:
        UnsupportedModelError: for another kind of model.
    """
    kind = str(model.config.model_type)
    if kind not in _HEADS or not hasattr(model, kind):
        raise UnsupportedModelError(
            f"the model must be a BertForMaskedLM or RobertaForMaskedLM, got {type(model).__name__}"
        )
    old = {name: value.detach().float() for name, value in model.state_dict().items()}
    body = f"{kind}."
    places = old[f"{body}embeddings.position_embeddings.weight"]
    if kind == "roberta":  # its positions count from the padding token's id
        places = places[int(model.config.pad_token_id or 0) + 1 :]
    config = _config(model, scheme, len(places), changes)
    check(
        config.hidden_act == model.config.hidden_act,
        "hidden_act must stay the trained model's",
    )
    target = TupeForMaskedLM(config)
    state = target.state_dict()
    segment = old[f"{body}embeddings.token_type_embeddings.weight"][0]
    words = old[f"{body}embeddings.word_embeddings.weight"]
    state["tupe.embeddings.word_embeddings.weight"] = words + segment
    _copy(state, "tupe.embeddings.layer_norm", old, f"{body}embeddings.LayerNorm")
    for layer in range(config.num_hidden_layers):
        for ours, theirs in _LAYER:
            source = f"{body}encoder.layer.{layer}.{theirs}"
            _copy(state, f"tupe.layers.{layer}.{ours}", old, source)
    growth = config.position_scheme.terms**0.25  # of queries and of keys
    for layer in range(config.num_hidden_layers):
        for part in ("query", "key"):
            for tensor in ("weight", "bias"):
                state[f"tupe.layers.{layer}.attention.{part}.{tensor}"] *= growth
    if config.position_scheme.absolute == "added":
        state["tupe.embeddings.position_embeddings.weight"] = places
    else:
        _untie(state, places, config.position_scheme.relative)
    dense, norm, bias = _HEADS[kind]
    _copy(state, "lm_head.dense", old, dense)
    _copy(state, "lm_head.layer_norm", old, norm)
    state["lm_head.decoder.bias"] = old[bias]
    # tied; the segment's share is one number for the whole vocabulary and cancels in a softmax
    state["lm_head.decoder.weight"] = state["tupe.embeddings.word_embeddings.weight"]
    target.load_state_dict(state)
    return target.eval()


def _untie(state: dict[str, Tensor], places: Tensor, relative: bool) -> None:
    inside = "tupe.position_bias."
    mean = places.mean(0, keepdim=True)
    state[f"{inside}positions.weight"] = torch.cat([mean, places])
    for tensor in ("weight", "bias"):
        norm = state[f"tupe.embeddings.layer_norm.{tensor}"]
        state[f"{inside}layer_norm.{tensor}"] = norm.clone()
    for part in ("query", "key"):
        state[f"{inside}{part}.weight"] = state[f"tupe.layers.0.attention.{part}.weight"].clone()
        state[f"{inside}{part}.bias"] = torch.zeros_like(state[f"{inside}{part}.bias"])
    if relative:
        state[f"{inside}relative.weight"] = torch.zeros_like(state[f"{inside}relative.weight"])


def _copy(state: dict[str, Tensor], ours: str, old: dict[str, Tensor], theirs: str) -> None:
    for tensor in ("weight", "bias"):
        state[f"{ours}.{tensor}"] = old[f"{theirs}.{tensor}"].clone()


def _config(
    model: PreTrainedModel, scheme: str, positions: int, changes: dict[str, Any]
) -> TupeConfig:
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "layer_norm_eps",
        "initializer_range",
        "bos_token_id",
        "pad_token_id",
        "eos_token_id",
    )
    fields = {name: getattr(model.config, name) for name in same}
    return TupeConfig(
        **{**fields, "scheme": scheme, "max_position_embeddings": positions, **changes}
    )
