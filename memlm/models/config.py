"""Configurations of models around another one: the base model's, and what was put around it.

Whatever they do not define themselves is the base model's (``vocab_size``, ``hidden_size``,
``use_cache``, ...), so code that reads a model's configuration keeps working.
"""

import copy
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

MODEL_TYPE = "memlm"


def speak_for(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Let a model around ``base`` generate as it does, and say which of its weights are tied."""
    generation = copy.deepcopy(base.generation_config)
    generation.disable_compile = True  # a search is no part of a compiled graph
    model.generation_config = generation
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {
        f"base.{name}": f"base.{source}" for name, source in tied.items()
    }


class AroundConfig(PreTrainedConfig):
    """The configuration of a model around a base model.

    Attributes:
        text_config: the base model's configuration (the object itself while it is in memory).
        base: where the base model's weights are: ``{"path": name or None, "fingerprint": hash}``;
            None as path means beside this configuration, in ``base/``.
    """

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.base = base or {}

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The configuration of the base model's decoder."""
        text_config = self.__dict__.get("text_config")
        return self if text_config is None else text_config.get_text_config(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # only reached for what neither this object nor its class has
        text_config = self.__dict__.get("text_config")
        if text_config is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(text_config, name)


class MemoryConfig(AroundConfig):
    """How a ``MemoryForCausalLM`` is put together.

    Attributes:
        text_config: see `AroundConfig`.
        base: alike.
        memory: what the memory was made of (see ``models.saved``).
        merge: settings of the merge.
        tap: settings of the tap.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        base: dict[str, Any] | None = None,
        memory: dict[str, Any] | None = None,
        merge: dict[str, Any] | None = None,
        tap: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(text_config, base, **kwargs)
        self.memory = memory or {}
        self.merge = merge or {}
        self.tap = tap or {}


AutoConfig.register(MODEL_TYPE, MemoryConfig, exist_ok=True)
