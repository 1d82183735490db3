"""Errors a user can meet. Each message is one sentence: what must hold, what came, what to do."""


class MemlmError(Exception):
    """Root of every error memlm raises on purpose."""


class InputError(MemlmError, ValueError):
    """An argument, a configuration or an input text is not usable as given."""


class StoreError(MemlmError, RuntimeError):
    """A datastore on disk cannot be used as it is."""


class FingerprintError(StoreError):
    """A store, index or saved model was made from something else than what it now meets."""


class CorruptStoreError(StoreError):
    """A file of a store is missing, truncated or altered."""


class UnsupportedModelError(MemlmError, RuntimeError):
    """The model does not offer the place memlm would have to reach."""


class MissingExtraError(MemlmError, RuntimeError):
    """An optional dependency is not installed; the message holds the pip command."""


def first_line(error: Exception) -> str:
    """What another library says, short enough for a sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
