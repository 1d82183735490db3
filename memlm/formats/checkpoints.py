"""Checkpoints of fairseq: tensors and the settings of the run, read without running the pickle.

A ``.pt`` file of fairseq is a pickle of

    args or cfg            settings: a Namespace until 0.10, nested dictionaries since
    model                  name -> tensor
    optimizer_history, extra_state, last_optimizer_state, ...          not needed here

in the container of any version of torch. Tensors, plain values, numbers of NumPy and Namespaces are
admitted; objects of fairseq and omegaconf become inert (`memlm.formats.pickles`).
"""

import argparse
import collections
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, _utils

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.pickles import ARRAYS, Admitted, Inert, RestrictedUnpickler

_INERT = ("fairseq", "omegaconf", "enum")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool")
_ADMITTED: Admitted = {
    "Namespace": (("argparse",), argparse.Namespace),
    "OrderedDict": (("collections",), collections.OrderedDict),
    "defaultdict": (("collections",), collections.defaultdict),
    "set": (("builtins", "__builtin__"), set),
    "Size": (("torch",), torch.Size),
    "device": (("torch",), torch.device),
    "_rebuild_tensor": (("torch._utils",), _utils._rebuild_tensor),
    "_rebuild_tensor_v2": (("torch._utils",), _utils._rebuild_tensor_v2),
    "_rebuild_parameter": (("torch._utils",), _utils._rebuild_parameter),
    **{name: (("torch",), getattr(torch, name)) for name in _DTYPES},
    **ARRAYS,
}


class Checkpoint(NamedTuple):
    """What a checkpoint says about its model.

    Attributes:
        settings: of task and model; of those in both, the model's.
        tensors: by fairseq's names, on the CPU, in their own dtypes.
        path: of the file.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of fairseq.

    Args:
        path: of the ``.pt`` file.

    Raises:
        InputError: if the file names something that is not admitted, or is no checkpoint of it.
        CorruptStoreError: if it is missing or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CorruptStoreError(f"{path} must be a file but is not; is the path right?")

    class Unpickler(RestrictedUnpickler):
        def __init__(self, file: Any, **kwargs: Any):
            super().__init__(file, path, _ADMITTED, "a checkpoint's numbers", _INERT, **kwargs)

    # what torch.load asks of a pickle module
    module = types.SimpleNamespace(
        __name__="restricted",
        Unpickler=Unpickler,
        load=lambda file, **kwargs: Unpickler(file, **kwargs).load(),
    )
    try:
        state = torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CorruptStoreError(
            f"{path} must be a checkpoint but cannot be read ({type(error).__name__}: {error}); "
            "fetch it again"
        ) from error
    check(
        isinstance(state, Mapping) and isinstance(state.get("model"), Mapping),
        f"{path} must be a checkpoint of fairseq with the entry 'model', got "
        f"{sorted(state) if isinstance(state, Mapping) else type(state).__name__}",
    )
    tensors = {str(name): value for name, value in state["model"].items()}
    strange = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    check(not strange, f"the model of {path} must consist of tensors, but {strange[:3]} are not")
    return Checkpoint(_settings(state, path), tensors, path)


def _settings(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    args, cfg = state.get("args"), state.get("cfg")
    if args is not None:
        return _plain(args)
    check(
        isinstance(cfg, Mapping),
        f"{path} must say how its model was made, in 'args' or 'cfg', but has neither",
    )
    merged: dict[str, Any] = {}
    for part in ("task", "model"):
        merged |= _plain(cfg.get(part) or {})  # type: ignore[union-attr]
    return merged


def _plain(values: Any) -> dict[str, Any]:
    """A Namespace or mapping as a dictionary; a choice of an enumeration as its value."""
    items = vars(values) if isinstance(values, argparse.Namespace) else dict(values)
    return {name: _value(value) for name, value in items.items()}


def _value(value: Any) -> Any:
    chosen = getattr(value, "args", ()) if isinstance(value, Inert) else ()
    return chosen[0] if len(chosen) == 1 else value
