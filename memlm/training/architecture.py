"""A new model of any Hugging Face architecture, for a tokenizer of one's own."""

import json
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import memlm.models.adaptive.decoder  # noqa: F401  registers its family
from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.randomness import random_state_kept


def model_of(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, seed: int = 1
) -> PreTrainedModel:
    """A model with random weights whose vocabulary is the tokenizer's.

    Args:
        path: a configuration file as ``save_pretrained`` writes it (``config.json``), with
            ``model_type`` and whatever differs from its defaults.
        tokenizer: decides the size of the vocabulary and the special tokens.
        seed: of the weights.

    Raises:
        InputError: if the file is no such configuration.
    """
    path = Path(path)
    check(path.is_file(), f"an architecture must be a configuration file, but {path} is none")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type")
        values |= {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        with random_state_kept():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} must be the configuration of a causal language model with model_type, but "
            f"{error}"
        ) from error
