"""Does a memory belong to a model? Its store says which model, tokenizer and tap made its keys.

Keys of another model, or read at another place, are numbers of another space: searching them gives
plausible neighbours and wrong predictions, silently. So the fingerprints in the store's manifest
are compared with those of the model at hand, and both are named when they differ.
"""

from typing import Any

from transformers import PreTrainedModel

from memlm.core.errors import FingerprintError
from memlm.core.types import TokenMemory
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.models.taps import Tap

_UNKNOWN = (None, "", "none", "unknown")  # importers may not know


def identity_of(memory: TokenMemory) -> Any:
    """The identity of the memory's store, None if it has no store or the store does not say."""
    manifest = getattr(getattr(memory, "store", None), "manifest", None)
    return getattr(manifest, "identity", None)


def stored_tap(memory: TokenMemory) -> str | None:
    """Where the keys of the memory's store were read, None if unknown."""
    tap = getattr(identity_of(memory), "tap", None)
    return None if tap in _UNKNOWN else tap


def check_match(
    model: PreTrainedModel,
    memory: TokenMemory,
    tap: Tap,
    *,
    tokenizer: Any = None,
    verify: bool = True,
) -> None:
    """Compare the memory's store with the model it is to serve; unknown values are not compared.

    Args:
        model: the base model.
        memory: with or without a store; of several memories, all are compared.
        tap: where the model's queries will be read.
        tokenizer: compared too, if given.
        verify: compare the model's fingerprint, which reads all its weights.

    Raises:
        FingerprintError: naming what differs, and both values.
    """
    seen: list[Any] = []
    for member in getattr(memory, "members", (memory,)):
        identity = identity_of(member)
        if identity is not None and identity not in seen:
            seen.append(identity)
            _check_identity(model, member, identity, tap, tokenizer, verify)


def _check_identity(
    model: PreTrainedModel,
    memory: TokenMemory,
    identity: Any,
    tap: Tap,
    tokenizer: Any,
    verify: bool,
) -> None:
    store = getattr(memory, "store", None)
    name = f"the store {getattr(store, 'path', '')}".rstrip()
    if identity.tap not in _UNKNOWN and identity.tap != tap.name:
        raise FingerprintError(
            f"{name} holds keys read at tap {identity.tap!r}, got tap {tap.name!r}; leave `tap` "
            "out to use the store's"
        )
    if tokenizer is not None and identity.tokenizer_hash not in _UNKNOWN:
        found = tokenizer_hash(tokenizer)
        if found != identity.tokenizer_hash:
            raise FingerprintError(
                f"{name} was made with tokenizer {identity.tokenizer_hash}, got {found}; use the "
                "tokenizer it was made with or build another store"
            )
    if verify and identity.model_hash not in _UNKNOWN:
        found = model_hash(model)
        if found != identity.model_hash:
            raise FingerprintError(
                f"{name} was made by model {identity.model_hash} ({identity.model}), got {found} "
                f"in {model.dtype}; load the same weights in the same dtype, build another store, "
                "or pass verify=False if you know they agree"
            )
