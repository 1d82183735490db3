"""Running a model only to read it: no gradients, no dropout, its state given back afterwards."""

import os
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


def device_named(name: str) -> str:
    """The device to put a model on.

    Args:
        name: torch's, or "auto": of several processes each takes the GPU of its number; without a
            GPU, the processor.

    Raises:
        InputError: if torch cannot use it here.
    """
    if name == "auto":
        number = os.environ.get("LOCAL_RANK", 0)
        name = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the device must be auto, cpu or one that torch can use here, got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return name


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
