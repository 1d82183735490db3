"""Saving a model with memory: the base model by copy or by name, the memory by reference.

    config.json             the base model's configuration, merge, tap, and where everything is
    base/                   the base model (``base="copy"``)

A base model that ``extend_context`` prepared is prepared alike when it is loaded.
A store is not copied: the configuration names its place (relative and absolute, so that either a
whole folder or only the model may move), its fingerprint and the memory's settings. Everything
that is found again is compared with the fingerprint that was saved.
"""

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from memlm.core.errors import FingerprintError, InputError, StoreError
from memlm.core.types import TokenMemory
from memlm.memory.automaton import AutomatonMemory
from memlm.memory.automaton_config import AutomatonConfig
from memlm.memory.knn import KnnConfig, KnnMemory
from memlm.memory.local import LocalMemory
from memlm.memory.long import LongMemory
from memlm.memory.together import Together
from memlm.models.config import AroundConfig
from memlm.models.extend import extend_again, extension_settings, is_extended
from memlm.models.fingerprint import model_hash
from memlm.store.manifest import MANIFEST
from memlm.store.reader import Datastore

BASE_FOLDER = "base"


def write_base(model: PreTrainedModel, directory: str, kind: str, **kwargs: Any) -> dict[str, Any]:
    """Save the base model as asked.

    Args:
        model: the base model.
        directory: of the whole.
        kind: ``"copy"`` or ``"reference"``.
        kwargs: for its ``save_pretrained``; a ``state_dict`` may be that of the whole.

    Returns:
        What the configuration records: ``path`` (None: beside it), ``fingerprint``, and with which
        settings ``extend_context`` is in force, if it is.

    Raises:
        InputError: for another kind, or a reference to a model that came from nowhere.
    """
    if kind not in ("copy", "reference"):
        raise InputError(f"base must be 'copy' or 'reference', got {kind!r}")
    saved: dict[str, Any] = {"path": None, "fingerprint": model_hash(model)}
    if (settings := extension_settings(model)) is not None:
        saved["extended"] = settings
    if kind == "reference":
        name = model.config.name_or_path
        if not name:
            raise InputError(
                "base='reference' needs a base model that was loaded by name or path, but this "
                "one was not; use base='copy'"
            )
        path = os.path.abspath(name) if os.path.isdir(name) else name
        return {**saved, "path": path}
    if (state := kwargs.get("state_dict")) is not None:
        kwargs["state_dict"] = {
            name.removeprefix("base."): value
            for name, value in state.items()
            if name.startswith("base.")
        }
    if isinstance(model.config, AroundConfig):  # a copy stands by itself
        kwargs["base"] = kind
    model.save_pretrained(os.path.join(directory, BASE_FOLDER), **kwargs)
    return saved


def load_base(
    saved: dict[str, Any],
    directory: str,
    base: PreTrainedModel | str | None = None,
    *,
    verify: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """The base model that ``write_base`` recorded.

    Args:
        saved: what the configuration records.
        directory: of the whole, or its name on the Hub.
        base: the model itself, or where it is now.
        verify: compare fingerprints.
        kwargs: for loading, e.g. ``dtype``.

    Raises:
        FingerprintError: if the weights are not those that were saved.
    """
    if isinstance(base, PreTrainedModel):
        model = base
    elif base is None and saved.get("path") is None:
        beside = os.path.join(directory, BASE_FOLDER)
        if not os.path.isdir(beside):  # on the Hub
            beside, kwargs = directory, {**kwargs, "subfolder": BASE_FOLDER}
        model = AutoModelForCausalLM.from_pretrained(beside, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(base or saved["path"], **kwargs)
    wanted = saved.get("fingerprint")
    if verify and wanted and (found := model_hash(model)) != wanted:
        raise FingerprintError(
            f"{directory} was saved with base model {wanted}, got {found} from "
            f"{model.config.name_or_path or 'the given model'} in {model.dtype}; give the model it "
            "was saved with as `base`, or pass verify=False if you know they agree"
        )
    if (settings := saved.get("extended")) is not None and not is_extended(model):
        extend_again(model, settings)
    return model


def write_memory(memory: TokenMemory, directory: str) -> dict[str, Any]:
    """What is needed to find a memory again: its store, its settings, its description."""
    saved: dict[str, Any] = {"description": memory.describe()}
    if isinstance(memory, Together):
        saved["members"] = [write_memory(member, directory) for member in memory.members]
        saved["lams"] = None if memory.lams is None else list(memory.lams)
        return saved
    if isinstance(memory, LocalMemory | LongMemory):
        saved["settings"] = memory.to_dict()
    elif isinstance(memory, KnnMemory | AutomatonMemory):
        saved["settings"] = memory.config.to_dict()
    store = getattr(memory, "store", None)
    if isinstance(store, Datastore):
        path = os.path.abspath(store.path)
        saved["store"] = {
            "path": path,
            "relative": os.path.relpath(path, os.path.abspath(directory)),
            "fingerprint": store.fingerprint,
        }
    return saved


def load_memory(
    saved: dict[str, Any], directory: str, store: str | os.PathLike[str] | None = None
) -> TokenMemory:
    """The memory that ``write_memory`` recorded.

    Args:
        saved: what the configuration records.
        directory: of the whole.
        store: where the datastore is now, if it was moved.

    Raises:
        InputError: if the memory is of a kind that only its maker can make again.
        StoreError: if the store is not where it was.
        FingerprintError: if it is another store.
    """
    if members := saved.get("members"):
        loaded = [load_memory(member, directory, store) for member in members]
        return Together(*loaded, lams=saved.get("lams"))
    settings = saved.get("settings", {})
    kind = settings.get("kind")
    for dense in (LocalMemory, LongMemory):
        if kind == dense.__name__:
            return dense.from_dict(settings)
    if "store" in saved and kind in (KnnConfig.__name__, AutomatonConfig.__name__):
        opened = _open_store(saved["store"], directory, store)
        if kind == KnnConfig.__name__:
            return KnnMemory.from_config(opened, KnnConfig.from_dict(settings))
        return AutomatonMemory.from_config(opened, AutomatonConfig.from_dict(settings))
    raise InputError(
        f"{directory} was saved with a memory that cannot be made again from settings "
        f"({saved.get('description')}); make it and pass it as `memory`"
    )


def _open_store(
    saved: dict[str, Any], directory: str, store: str | os.PathLike[str] | None
) -> Datastore:
    places = [Path(directory, saved["relative"]), Path(saved["path"])]
    if store is not None:
        places = [Path(store)]
    place = next((place for place in places if (place / MANIFEST).is_file()), None)
    if place is None:
        raise StoreError(
            f"the datastore {saved['fingerprint']} must be at "
            f"{' or '.join(str(place) for place in places)} but is not; say where with `store`"
        )
    opened = Datastore.open(place.resolve())
    if opened.fingerprint != saved["fingerprint"]:
        raise FingerprintError(
            f"{directory} was saved with store {saved['fingerprint']}, got {opened.fingerprint} at "
            f"{place}; say with `store` where the right one is"
        )
    return opened
