"""The layers of any causal language model, and a proof that they can be reached from outside.

A decoder of the usual kind keeps its layers in one list; each takes ``(batch, time, dim)`` hidden
states as its first argument and hands on what it adds to them. A hook in front of a layer can
therefore add to the residual stream. The probe shows that this is so: every layer comes by once, in
order, with states of that shape, and other states in front of a layer lead to other predictions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.core.errors import UnsupportedModelError
from memlm.models.running import frozen
from memlm.models.taps import body

_PROBE_TOKENS = 6


def find_blocks(model: PreTrainedModel, reached: Sequence[int]) -> list[nn.Module]:
    """The layers of a causal language model, in order.

    Args:
        model: the causal language model.
        reached: numbers from 0 of the layers that must be reachable.

    Raises:
        UnsupportedModelError: if the model keeps them in an unusual way, or the probe fails.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        child
        for child in body(model).children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(lists) != 1:
        raise UnsupportedModelError(
            f"the body of {type(model).__name__} must hold its {depth} layers in one list, but has "
            f"{len(lists)} such lists; use a decoder with ordinary layers"
        )
    blocks = list(lists[0])
    _prove(model, blocks, reached)
    return blocks


@contextmanager
def in_front(block: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``change`` make the hidden states that a layer reads, for the block of code.

    Args:
        block: the layer.
        change: ``(batch, time, dim)`` to the same.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _prove(model: PreTrainedModel, blocks: list[nn.Module], reached: Sequence[int]) -> None:
    config = model.config.get_text_config()
    tokens = torch.arange(_PROBE_TOKENS, device=model.device)[None] % config.vocab_size
    came: list[tuple[int, tuple[int, ...]]] = []

    def note(number: int) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            came.append((number, tuple(x.shape)))
            return x

        return look

    with frozen(model):
        with ExitStack() as looking:
            for number, block in enumerate(blocks):
                looking.enter_context(in_front(block, note(number)))
            logits = model(input_ids=tokens, use_cache=False).logits
        shape = (1, _PROBE_TOKENS, config.hidden_size)
        if came != [(number, shape) for number in range(len(blocks))]:
            raise UnsupportedModelError(
                f"every layer of {type(model).__name__} must read hidden states of shape {shape}, "
                f"one after the other, but a probe saw {came[:3]}; use a decoder with ordinary "
                "layers"
            )
        for number in reached:
            with in_front(blocks[number], lambda x: x + x.flip(-1).abs()):
                if torch.equal(model(input_ids=tokens, use_cache=False).logits, logits):
                    raise UnsupportedModelError(
                        f"what is added in front of layer {number + 1} must change the predictions "
                        f"of {type(model).__name__}, but it does not; choose other layers"
                    )
