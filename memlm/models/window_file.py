"""A cache of constant size on disk: whatever a model has read so far, in one small file.

One safetensors file holds the sinks and rings of all layers (`memlm.models.window_cache`), and
their middle tokens where there are any (`memlm.models.middle_cache`), with the settings and the
fingerprint of the model that made them in its metadata, so that a text of any length can be read on
another day. It is written whole or not at all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.core.files import write_atomic
from memlm.models.fingerprint import model_hash
from memlm.models.middle_cache import MiddleLayer
from memlm.models.running import device_of
from memlm.models.window_cache import WindowLayer
from memlm.ops.lambda_rule import LambdaConfig
from memlm.ops.middle_rule import MiddleConfig

_PARTS = ("keys", "values", "positions")


def save_window(
    cache: Cache,
    path: Path | str,
    model: PreTrainedModel,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    notes: Mapping[str, Any] | None = None,
    model_fingerprint: str | None = None,
) -> None:
    """Write the cache of an extended model.

    Args:
        cache: from a forward pass or ``generate`` of a model that ``extend_context`` prepared.
        path: of the file; its folder exists.
        model: that made it.
        tensors: to be kept beside it, by names without a dot.
        notes: plain JSON values to be kept beside it.
        model_fingerprint: of ``model``, if it is known; making one reads all weights.

    Raises:
        InputError: for any other cache, or one that holds nothing yet.
        StoreError: if the file cannot be written.
    """
    layers: Any = getattr(cache, "layers", None)
    if not layers or not all(
        isinstance(layer, WindowLayer) and layer.is_initialized for layer in layers
    ):
        raise InputError(
            "only the cache of an extended model that has read something can be saved, got a "
            f"{type(cache).__name__} of another kind; pass the past_key_values of its output"
        )
    kept = dict(tensors or {})
    for number, layer in enumerate(layers):
        for part in _PARTS:
            kept[f"{number}.{part}"] = getattr(layer, part).detach().cpu().contiguous()
        if isinstance(layer, MiddleLayer):
            for name, part in layer.store.held().items():
                kept[f"{number}.middle.{name}"] = part.detach().cpu().contiguous()
    about = {
        "model": model_fingerprint or model_hash(model),
        "layers": [_described(layer) for layer in layers],
        "notes": dict(notes or {}),
    }
    data = save(kept, metadata={"memlm": json.dumps(about)})
    write_atomic(Path(path), lambda file: file.write(data))


def load_window(
    path: Path | str, model: PreTrainedModel, *, model_fingerprint: str | None = None
) -> tuple[Cache, dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_window`` wrote, onto the model's device.

    Returns:
        The cache, to be passed as ``past_key_values``; tensors and notes.

    Raises:
        CorruptStoreError: if the file is missing or not whole.
        FingerprintError: if another model made it.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(device_of(model))) as file:
            about = json.loads(file.metadata()["memlm"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{path} must be a cache that save_window wrote, but it cannot be read ({error}); "
            "begin the text anew"
        ) from error
    ours = model_fingerprint or model_hash(model)
    if about["model"] != ours:
        raise FingerprintError(
            f"the cache {path} was made by another model ({about['model']}) than this one "
            f"({ours}); load the model that made it, or begin the text anew"
        )
    layers = []
    for number, described in enumerate(about["layers"]):
        layer = _empty(described)
        keys, values, positions = (tensors.pop(f"{number}.{part}") for part in _PARTS)
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
        for held, part in zip(
            (layer.keys, layer.values, layer.positions), (keys, values, positions), strict=True
        ):
            held.copy_(part)
        layer.count(described["length"])
        if isinstance(layer, MiddleLayer):
            begin = f"{number}.middle."
            mine = [name for name in tensors if name.startswith(begin)]
            layer.store.put({name.removeprefix(begin): tensors.pop(name) for name in mine})
        layers.append(layer)
    return Cache(layers=layers), tensors, about["notes"]


def _described(layer: WindowLayer) -> dict[str, Any]:
    about: dict[str, Any] = {"config": layer.config.to_dict(), "length": layer.length}
    if isinstance(layer, MiddleLayer):
        about["middle"] = layer.middle.to_dict()
    return about


def _empty(described: Mapping[str, Any]) -> WindowLayer:
    config = LambdaConfig.from_dict(described["config"])
    if "middle" not in described:
        return WindowLayer(config)
    return MiddleLayer(config, MiddleConfig.from_dict(described["middle"]))
