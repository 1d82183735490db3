"""Running a model only to read it: no gradients, no dropout, its state given back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from memlm.core.errors import InputError, UnsupportedModelError

# Marks the body of a model whose context `models.extend` made endless.
EXTENDED = "_memlm_window"


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and inference mode for the block; every part's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def device_of(model: PreTrainedModel) -> torch.device:
    """Where inputs go: the model's device, or the one to which its offloaded weights come.

    Raises:
        UnsupportedModelError: if the weights are nowhere.
    """
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        # of `accelerate`
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    raise UnsupportedModelError(
        f"the weights of {type(model).__name__} must be somewhere, but they are on the meta "
        "device; load the model with from_pretrained"
    )


def check_length(model: PreTrainedModel, longest: int) -> None:
    """Refuse windows of more input tokens than the model has positions for.

    A model with an extended context reads any length.

    Raises:
        InputError: naming both numbers.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if hasattr(model.get_decoder(), EXTENDED):
        return
    if limit is not None and longest > limit:
        raise InputError(
            f"windows must not be longer than the model's {limit} positions, got {longest} input "
            "tokens; choose a smaller window length"
        )
