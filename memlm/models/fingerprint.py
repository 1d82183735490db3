"""Fingerprints of models (and, beside them, tokenizers): equal where they would make the same keys.

A store is only good for the model and tokenizer that made it. The model's fingerprint covers what
its numbers depend on: the settings that differ from their defaults, and the name, shape, type and
bytes of every weight. It leaves out what does not matter (names, versions, dropout, generation
settings), so a renamed or re-saved copy keeps its fingerprint. xxh3 runs at memory speed.
"""

from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.errors import UnsupportedModelError
from memlm.core.files import fingerprint
from memlm.data.fingerprint import tokenizer_hash as tokenizer_hash

# Settings that change no hidden state of an evaluated model.
_VOLATILE = {
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_VOLATILE_ENDINGS = ("_token_id", "dropout", "pdrop", "_dropout_prob", "initializer_range")


def model_hash(model: PreTrainedModel) -> str:
    """The fingerprint of a model's settings and weights, as ``"xxh3_128:<hex>"``.

    Raises:
        UnsupportedModelError: if weights are neither in memory nor offloaded by `accelerate`.
    """
    settings = _stable(model.config.to_diff_dict())
    digest = xxhash.xxh3_128()
    seen: set[Any] = set()
    shared = _shared(model)
    for name, tensor in sorted(model.state_dict().items()):
        # Tied weights appear under several names, and which are saved depends on the version.
        place: Any = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.is_meta:
            place = shared.get(name, name)
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        tensor = _offloaded(model, name) if tensor.is_meta else tensor
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes(tensor))
    return fingerprint({"settings": settings, "weights": digest.hexdigest()})


def _shared(model: PreTrainedModel) -> dict[str, str]:
    """For every tied weight one name that all who share it have in common."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {**tied, **{source: source for source in tied.values()}}


def _offloaded(model: PreTrainedModel, name: str) -> Tensor:
    """A weight that `accelerate` keeps elsewhere until its module runs."""
    path, _, leaf = name.rpartition(".")
    hook: Any = getattr(model.get_submodule(path), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        kept = getattr(part, "weights_map", None)
        if kept is not None:
            return kept[leaf]
    raise UnsupportedModelError(
        f"the weights must be in memory or offloaded to be fingerprinted, but {name} is on the "
        "meta device alone; load the model with from_pretrained"
    )


def _stable(values: Any) -> Any:
    if isinstance(values, dict):
        return {
            str(name): _stable(value)
            for name, value in values.items()
            if name not in _VOLATILE
            and not str(name).startswith("_")
            and not str(name).endswith(_VOLATILE_ENDINGS)
        }
    if isinstance(values, list | tuple):
        return [_stable(value) for value in values]
    return values if isinstance(values, str | int | float | bool) or values is None else str(values)


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().data
