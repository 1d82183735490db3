"""The probe: short forward passes which prove that Lambda attention is what a model now computes.

A seam that is not reached fails silently, so a model is only extended after three tests:

    reached      every layer came by, once
    agreement    with a window over the whole probe the hidden states are the model's own
    truncation   with a window of one token and one sink, at most two tokens away, equal tokens
                 have equal hidden states wherever they stand, before and after a cache: nothing
                 but the sink is seen from outside the window, nothing but distances counts

A family that is on no list must also show that its own hidden states depend on positions: where
they do not, agreement would prove nothing.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.core.errors import UnsupportedModelError
from memlm.models.running import frozen
from memlm.ops.window_attention import LambdaConfig

_LENGTH = 16
# one token, and one sink at most two tokens away
TRUNCATION = LambdaConfig(window=1, sinks=1, distance_limit=2)


class Probe(NamedTuple):
    """Tokens, and what the model makes of them before it is extended.

    Attributes:
        tokens: ``(1, length)`` int64.
        states: ``(1, length, dim)`` hidden states.
        still: the same with every token at position 0; None where the family is known.
    """

    tokens: Tensor
    states: Tensor
    still: Tensor | None


def look(model: PreTrainedModel, inner: nn.Module, longest: int | None, known: bool) -> Probe:
    """Run the model as it is.

    Args:
        model: the causal language model, not yet extended.
        inner: its body.
        longest: how far every layer of it sees; None: no limit.
        known: whether its family is on the list.
    """
    length = min(_LENGTH, longest or _LENGTH)
    size = model.config.get_text_config().vocab_size
    tokens = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(0))
    if model.device.type != "meta":
        # the hooks of an offloaded model move its inputs themselves
        tokens = tokens.to(model.device)
    states = run(model, inner, tokens)
    if known:
        return Probe(tokens, states, None)
    at_zero = {"position_ids": torch.zeros_like(tokens), "attention_mask": torch.ones_like(tokens)}
    return Probe(tokens, states, run(model, inner, tokens, **at_zero))


def run(model: PreTrainedModel, inner: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    """Hidden states ``(1, length, dim)`` in float64."""
    with frozen(model):
        return inner(input_ids=tokens, use_cache=False, **inputs).last_hidden_state.double()


def tolerance(model: PreTrainedModel) -> float:
    """Largest relative error that is put down to rounding.

    Where activations are quantised too, it is by the range of each call, so equal tokens differ
    from call to call.
    """
    exact = model.dtype in (torch.float32, torch.float64) and not is_quantized(model)
    return 1e-3 if exact else 5e-2


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether transformers or torch have quantised its layers."""
    return bool(getattr(model, "is_quantized", False)) or any(
        "quantized" in type(module).__module__ for module in model.modules()
    )


def check_reached(model: PreTrainedModel, reached: list[int]) -> None:
    """Every layer attended once.

    Raises:
        UnsupportedModelError: if one did not, or did more often.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(reached) != list(range(layers)):
        raise UnsupportedModelError(
            f"Lambda attention must be reached once in each of {layers} layers of "
            f"{type(model).__name__}, but it was reached in {len(set(reached))}, {len(reached)} "
            "times; use a model that has ordinary attention in every layer"
        )


def check_agreement(model: PreTrainedModel, probe: Probe, states: Tensor) -> None:
    """The same hidden states as before, and for a good reason.

    Raises:
        UnsupportedModelError: if they differ, or if they would agree whatever the positions.
    """
    off = _distance(states, probe.states)
    if not off <= tolerance(model):
        raise UnsupportedModelError(
            f"Lambda attention of {type(model).__name__} must agree with its own attention within "
            f"the window, but it is off by {off:.1e}; use a model that is loaded with its own "
            "unpatched attention"
        )
    if probe.still is None:
        return
    matter = _distance(probe.still, probe.states)
    if not matter > 10 * tolerance(model):
        raise UnsupportedModelError(
            f"a model of the unknown family {model.config.model_type!r} must show that positions "
            f"matter to it, but without them its hidden states change by {matter:.1e} only, so "
            "nothing can be proved; use trained weights, or a family of the list"
        )


def check_truncation(model: PreTrainedModel, inner: nn.Module, probe: Probe) -> None:
    """Equal tokens have equal hidden states under the settings ``TRUNCATION``, with a cache too.

    Raises:
        UnsupportedModelError: if they differ.
    """
    first, last = probe.tokens[:, :1], probe.tokens[:, -1:]
    tokens = torch.cat([first, first, last.expand(-1, 6)], dim=1)
    with frozen(model):
        begun = inner(input_ids=tokens[:, :5], use_cache=True)
        cache = begun.past_key_values
        ended = inner(input_ids=tokens[:, 5:], use_cache=True, past_key_values=cache)
    same = torch.cat([begun.last_hidden_state[:, 2:], ended.last_hidden_state], dim=1).double()
    off = _distance(same, same[:, -1:].expand_as(same))
    if not off <= tolerance(model):
        raise UnsupportedModelError(
            f"an extended {type(model).__name__} must see nothing outside its window but sinks at "
            f"their limit, but equal tokens differ by {off:.1e} from place to place; use a model "
            "whose positions act through distances alone"
        )


def _distance(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())
