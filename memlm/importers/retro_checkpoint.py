"""Checkpoints of the package retro-pytorch become RETRO models.

Widths, depths, layers with cross-attention, kind of norms and where they stand are read from
names and shapes. What a checkpoint does not hold must be given: the chunk size, and the residual
scales of models with norms behind the sub-layers, if they are not DeepNet's. Checkpoints of that
package always have 8 heads, whatever their makers asked for.

The model is made with ``compatibility="retro_pytorch"``: it was trained with that package's
positions in cross-attention. Names of older versions (fused keys and values) and of a saved
wrapper (``retro.`` in front) are understood.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.models.retro.causal_lm import RetroForCausalLM
from memlm.models.retro.config import RetroConfig

_SIDE = r"(encoder|decoder)\.layers\.(\d+)\."
_PARTS = {"0": "attention", "1": "cross", "2": "feed"}
_LINEARS = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out": "output"}
_FEED = {"0": "expand", "3": "contract"}
_NORMS = {"gamma": "weight", "weight": "weight", "bias": "bias"}
_TOP = {
    "token_emb.weight": "model.embed_tokens.weight",
    "pos_emb.weight": "model.embed_positions.weight",
    "to_decoder_model_dim.weight": "model.project.weight",
    "to_decoder_model_dim.bias": "model.project.bias",
    "to_logits.weight": "lm_head.weight",
    "to_logits.bias": "lm_head.bias",
    "encoder.project_out.weight": "model.encoder.output.weight",
    "encoder.project_out.bias": "model.encoder.output.bias",
}


def import_retro(
    state: Mapping[str, Tensor],
    *,
    chunk_size: int,
    heads: int = 8,
    **changes: Any,
) -> RetroForCausalLM:
    """A model from a state dictionary of retro-pytorch.

    Args:
        state: names as in the package.
        chunk_size: tokens per chunk.
        heads: 8 in every checkpoint of the package.
        changes: other fields of the configuration: dropout, ``pad_token_id``, the residual scales;
            for norms behind the sub-layers ``deepnet`` is True unless scales are given.

    Raises:
        InputError: for missing or unknown names.
    """
    plain = _plain(state)
    config = read_config(plain, chunk_size=chunk_size, heads=heads, **changes)
    model = RetroForCausalLM(config)
    wanted = model.state_dict()
    mapped = {}
    for name, value in plain.items():
        if name.endswith("rotary_pos_emb.inv_freq"):
            continue
        target = target_name(name, gated=config.norm == "gated_rms")
        if target not in wanted:
            raise InputError(f"a checkpoint of retro-pytorch must not have {name!r}; is it one?")
        mapped[target] = value.reshape(wanted[target].shape)
    if missing := sorted(set(wanted) - set(mapped)):
        raise InputError(
            f"a checkpoint of retro-pytorch must have everything a model needs, but nothing gives "
            f"{', '.join(missing[:5])}"
        )
    model.load_state_dict(mapped)
    return model.eval()


def read_config(
    state: Mapping[str, Tensor], *, chunk_size: int, heads: int = 8, **changes: Any
) -> RetroConfig:
    """The configuration of a state dictionary with plain names; arguments as of `import_retro`.

    Raises:
        InputError: if the state dictionary is not of such a model.
    """
    needed = (
        "token_emb.weight",
        "pos_emb.weight",
        "to_logits.weight",
        "encoder.project_out.weight",
    )
    for name in needed:
        check(name in state, f"a checkpoint of retro-pytorch must have {name!r}; is it one?")
    vocabulary, narrow = state["token_emb.weight"].shape
    layers = {
        side: [int(n[2]) for name in state if (n := re.match(_SIDE, name)) and n[1] == side]
        for side in ("encoder", "decoder")
    }
    crossed = {
        side: sorted(
            {
                int(n[2]) + 1
                for name in state
                if (n := re.match(_SIDE + r"1\.", name)) and n[1] == side
            }
        )
        for side in ("encoder", "decoder")
    }
    inner, width = state["decoder.layers.0.0.fn.to_q.weight"].shape
    norms = {
        name.rsplit(".", 1)[1] for name in state if name.startswith("decoder.layers.0.0.norm.")
    }
    kind = "layer" if "bias" in norms else "gated_rms" if "weight" in norms else "rms"
    norm_first = any(name.startswith("decoder.norm_out.") for name in state)
    scales = {"encoder_residual_scale", "decoder_residual_scale"} & set(changes)
    turned = state.get("decoder.rotary_pos_emb.inv_freq")
    values: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": max(layers["decoder"]) + 1,
        "num_attention_heads": heads,
        "head_dim": inner // heads,
        "encoder_hidden_size": narrow,
        "encoder_num_layers": max(layers["encoder"]) + 1,
        "chunk_size": chunk_size,
        "cross_attention_layers": crossed["decoder"],
        "encoder_cross_attention_layers": crossed["encoder"],
        "shared_embeddings": True,
        "learned_positions": True,
        "max_position_embeddings": len(state["pos_emb.weight"]),
        "rotary_dim": min(inner // heads, 32) if turned is None else 2 * len(turned),
        "norm": kind,
        "norm_first": norm_first,
        "deepnet": not norm_first and not scales,
        "head_bias": True,
        "initializer": "torch",
        "compatibility": "retro_pytorch",
        "pad_token_id": 0,
    }
    return RetroConfig(**{**values, **changes})


def target_name(name: str, *, gated: bool) -> str:
    """Where a tensor of retro-pytorch goes; the name itself if nowhere."""
    if name in _TOP:
        return _TOP[name]
    if final := re.fullmatch(r"(encoder|decoder)\.norm_out\.(\w+(?:\.\w+)?)", name):
        front = "model.encoder.norm" if final[1] == "encoder" else "model.norm"
        return f"{front}.{_norm(final[2], gated)}"
    found = re.fullmatch(_SIDE + r"([012])\.(.+)", name)
    if found is None:
        return name
    side = "model.encoder.layers" if found[1] == "encoder" else "model.layers"
    front, rest = f"{side}.{found[2]}.{_PARTS[found[3]]}", found[4]
    if norm := re.fullmatch(r"norm\.(\w+)", rest):
        return f"{front}.norm.{_norm(norm[1], gated)}"
    rest = rest.removeprefix("fn.").removeprefix("cross_attn.")
    if null := re.fullmatch(r"null_([kv])", rest):
        return f"{front}.inner.null_{'key' if null[1] == 'k' else 'value'}"
    if linear := re.fullmatch(r"(to_\w+)\.(weight|bias)", rest):
        return f"{front}.inner.{_LINEARS.get(linear[1], linear[1])}.{linear[2]}"
    if feed := re.fullmatch(r"ff\.([03])\.(weight|bias)", rest):
        return f"{front}.inner.{_FEED[feed[1]]}.{feed[2]}"
    return name


def _norm(name: str, gated: bool) -> str:
    return "gate" if gated and name == "weight" else _NORMS.get(name, name)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the latest version: no wrapper in front, keys and values apart."""
    plain: dict[str, Tensor] = {}
    for full, value in state.items():
        name = full.removeprefix("retro.")
        if name.endswith("to_kv.weight"):
            front = name.removesuffix("to_kv.weight")
            plain[front + "to_k.weight"], plain[front + "to_v.weight"] = value.chunk(2)
        elif name.endswith("null_kv"):
            front = name.removesuffix("null_kv")
            plain[front + "null_k"], plain[front + "null_v"] = value.unbind(0)
        else:
            plain[name] = value.float() if torch.is_floating_point(value) else value
    return plain
