"""Taps: which tensor of a causal language model is the key, and how to read it.

kNN-LM (Khandelwal et al. 2020, section 5) found that the best key is the *input of the last
feed-forward sub-layer, after its layer norm*, not the final hidden state. Of an encoder-decoder it
is the decoder's. A tap names that place:

    ffn_input    what enters the feed-forward of the last block (the papers' key)
    ffn_output   what leaves the last block, before the final norm
    final        what leaves the body (after the final norm): the input of the language-model head

The first two need to know where a family keeps its last feed-forward; the table below does. Every
causal model has the third. Hooks live only inside a ``with`` block, and nothing of the model is
changed. Under parallel residuals (GPT-NeoX, Phi, Cohere) the feed-forward's input is the norm that
attention shares; under OLMo 2's post-norm it is the residual stream. Both are "what enters it".

Differs from the papers' code: the reading is exact for every family of the table (checked by
tests), the hooks never outlive a call, and an unknown family is refused instead of guessed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.core.config import Config, check
from memlm.core.errors import InputError, UnsupportedModelError

TapName = Literal["ffn_input", "ffn_output", "final"]
TAP_NAMES: tuple[TapName, ...] = ("ffn_input", "ffn_output", "final")

# model_type -> (blocks inside the body, feed-forward inside a block)
_LLAMA = ("layers", "mlp")
_GPT2 = ("h", "mlp")
FAMILIES: dict[str, tuple[str, str]] = {
    "adaptive_lm": ("layers", "fc1"),  # `last_ffn_input` of TRIME's and kNN-LM's code
    "bart": ("layers", "fc1"),
    "bloom": _GPT2,
    "cohere": _LLAMA,
    "cohere2": _LLAMA,
    "falcon": _GPT2,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gpt_neox": _LLAMA,
    "gptj": _GPT2,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "m2m_100": ("layers", "fc1"),
    "marian": ("layers", "fc1"),
    "mbart": ("layers", "fc1"),
    "memlm_retro": ("layers", "feed.inner"),
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "opt": ("layers", "fc1"),
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "t5": ("block", "layer.2.DenseReluDense"),
}


@dataclass(frozen=True)
class Tap(Config):
    """A named place in a model: the input or output of one of its modules.

    Attributes:
        name: ``"ffn_input"``, ``"ffn_output"`` or ``"final"``; what stores record.
        module: dotted path of the module inside the model.
        side: whether the key enters or leaves that module.
    """

    name: TapName
    module: str
    side: Literal["input", "output"]

    def __post_init__(self) -> None:
        check(self.name in TAP_NAMES, f"tap must be one of {_named(TAP_NAMES)}, got {self.name!r}")
        check(self.side in ("input", "output"), f"side must be input or output, got {self.side!r}")


@dataclass
class Capture:
    """What a tap saw in the last forward pass.

    Attributes:
        states: ``(batch, time, dim)`` hidden states with their gradient, None before a forward.
    """

    states: Tensor | None = field(default=None)


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its language-model head: tokens in, final hidden states out.

    Raises:
        UnsupportedModelError: if the model does not separate the two.
    """
    inner = model.get_decoder()
    if inner is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} must keep its body apart from its head but `get_decoder()` "
            "returns the model itself; load the model with AutoModelForCausalLM"
        )
    return inner


def find_tap(model: PreTrainedModel, name: str = "auto") -> Tap:
    """Where the key is read in this model.

    Args:
        model: a causal language model with a head.
        name: a tap's name, or ``"auto"``: ``"ffn_input"`` for the families of the table, else
            ``"final"``.

    Raises:
        InputError: for a name that is no tap.
        UnsupportedModelError: if the family's feed-forward is not known, or not where it should be.
    """
    if name not in ("auto", *TAP_NAMES):
        raise InputError(f"tap must be 'auto' or one of {_named(TAP_NAMES)}, got {name!r}")
    inner = body(model)
    prefix = next(path for path, module in model.named_modules() if module is inner)
    family = getattr(inner, "config", model.config).model_type  # of what others were put around
    if name == "final" or (name == "auto" and family not in FAMILIES):
        return Tap("final", prefix, "output")
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"tap={name!r} needs a model family whose last feed-forward is known "
            f"({', '.join(sorted(FAMILIES))}), got {family!r}; use tap='final'"
        )
    blocks, ffn = FAMILIES[family]
    try:
        last = f"{prefix}.{blocks}.{len(model.get_submodule(f'{prefix}.{blocks}')) - 1}"  # type: ignore[arg-type]
        if name == "ffn_output":
            return Tap("ffn_output", last, "output")
        model.get_submodule(f"{last}.{ffn}")
    except (AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} must keep its feed-forward at {prefix}.{blocks}[-1].{ffn} as "
            f"the family {family!r} does, but {error}; use tap='final'"
        ) from error
    return Tap("ffn_input", f"{last}.{ffn}", "input")


@contextmanager
def capture(model: PreTrainedModel, tap: Tap) -> Iterator[Capture]:
    """Read the tap during the forward passes of the block; the hook is removed whatever happens.

    Yields:
        The capture whose ``states`` holds what the last forward pass showed.
    """
    seen = Capture()
    rows = 1

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        inputs = args[0] if args else kwargs.get("input_ids")
        rows = len(inputs if inputs is not None else kwargs["inputs_embeds"])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(_states(output))

    def keep(states: Tensor) -> None:
        # OPT flattens batch and time before its feed-forward
        seen.states = states if states.ndim == 3 else states.unflatten(0, (rows, -1))

    module = model.get_submodule(tap.module)
    handles = [body(model).register_forward_pre_hook(begin, with_kwargs=True)]
    if tap.side == "input":
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(after))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _ReachedError(Exception):
    """The tap fired; nothing later in the forward pass is needed."""


def forward_to_tap(model: PreTrainedModel, tap: Tap, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run the body only as far as the tap: the last feed-forward and the head cost nothing.

    Args:
        model: the causal language model.
        tap: from ``find_tap``.
        input_ids: ``(batch, time)`` int64.
        inputs: further arguments of the body, e.g. ``attention_mask``.

    Returns:
        ``(batch, time, dim)`` hidden states at the tap.
    """

    def stop(*_: Any) -> None:
        raise _ReachedError

    module = model.get_submodule(tap.module)
    with capture(model, tap) as seen:
        # registered after the capture's hook, so it fires after it
        if tap.side == "input":
            handle = module.register_forward_pre_hook(stop)
        else:
            handle = module.register_forward_hook(stop)
        try:
            body(model)(input_ids=input_ids, use_cache=False, **inputs)
        except _ReachedError:
            pass
        finally:
            handle.remove()
    return reached(seen, tap)


def reached(seen: Capture, tap: Tap) -> Tensor:
    """The captured states ``(batch, time, dim)``.

    Raises:
        UnsupportedModelError: if the forward pass never came by the tap.
    """
    if seen.states is None:
        raise UnsupportedModelError(
            f"the forward pass must reach {tap.module} (tap {tap.name!r}) but did not; "
            "use tap='final'"
        )
    return seen.states


def _states(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(repr(name) for name in names)
