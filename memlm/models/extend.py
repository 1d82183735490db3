"""Extending the context of a model: Lambda attention in place, without training, reversible.

A rotary model fails beyond the length it was trained on because distances, and the number of
tokens that share the attention, are new to it. LM-Infinite (Han et al. 2024) keeps both familiar:
every layer sees the last `window` tokens at their true distance and the first `sinks` ones at no
more than `distance_limit` (see `memlm.ops.window_attention`). Time is linear in the length and
the cache is constant.

How it reaches the model, through public seams only:

* an attention function and a mask function are registered under one name and selected with
  ``set_attn_implementation``;
* the rotary module is wrapped, so that keys arrive and are cached unrotated; they are rotated in
  the attention by the model's own rotary module and function, relative to the window;
* a hook on the body counts positions (padding does not count) and puts `WindowLayer`s into an
  empty cache, so that ``generate`` needs no new argument.

A probe forward pass proves that it worked; ``restore_context`` puts the identical objects back.

Differs from the paper's code: grouped keys, padding on either side and batches, and a cache that
does not grow. Its top-k tokens from the middle are not built.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models.running import EXTENDED, frozen
from memlm.models.taps import body
from memlm.models.window_cache import WindowLayer
from memlm.ops.window_attention import Keys, LambdaConfig, first_keys, window_attention

FAMILIES = ("gemma2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3")
# scalings whose frequencies do not depend on the length of the input
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_NAME = "memlm_window"
_PROBE = 8
# of every body, in this order
_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
)


def extend_context(
    model: PreTrainedModel,
    *,
    window: int,
    sinks: int = 10,
    distance_limit: int | Literal["window"] | None = "window",
    clamp: Literal["causal", "original"] = "causal",
) -> PreTrainedModel:
    """Let ``model`` read and write texts of any length, in place (LM-Infinite, Han et al. 2024).

    Args:
        model: a causal language model of a family in ``FAMILIES``.
        window: tokens seen at their true distance; at most the length the model was trained on.
        sinks: first tokens of the sequence that stay visible; the paper's code uses 10 to 100.
        distance_limit: largest distance at which sinks are scored; ``"window"``: as the paper's
            code; None: their true distance.
        clamp: see ``LambdaConfig``.

    Returns:
        The same model.

    Raises:
        InputError: for settings that cannot be, or if the model is extended already.
        UnsupportedModelError: if the family is not known or the probe fails.
    """
    limit = window if distance_limit == "window" else distance_limit
    config = LambdaConfig(window=window, sinks=sinks, distance_limit=limit, clamp=clamp)
    if is_extended(model):
        raise InputError(
            "the model must not be extended already, but it is; call restore_context(model) first"
        )
    _check_model(model, config)
    inner = body(model)
    probe = torch.arange(_PROBE, device=model.device)[None] % model.config.vocab_size
    with frozen(model):
        expected = inner(input_ids=probe, use_cache=False).last_hidden_state
    extension = _Extension(model, inner, config)
    try:
        extension.prove(probe, expected)
    except BaseException:
        extension.undo()
        raise
    return model


def restore_context(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``extend_context``: the model's own rotary module and attention come back.

    Raises:
        InputError: if the model is not extended.
    """
    if not is_extended(model):
        raise InputError("the model must be extended, but it is not; call extend_context(model)")
    getattr(body(model), EXTENDED).undo()
    return model


@contextmanager
def extended(model: PreTrainedModel, **settings: Any) -> Iterator[PreTrainedModel]:
    """``extend_context`` for the block; arguments as there."""
    extend_context(model, **settings)
    try:
        yield model
    finally:
        restore_context(model)


def is_extended(model: PreTrainedModel) -> bool:
    """Whether ``extend_context`` is in force."""
    return hasattr(body(model), EXTENDED)


class _StillRotary(nn.Module):
    """The rotary module at position 0, without its scale: multiplying by it changes nothing."""

    def __init__(self, real: nn.Module):
        super().__init__()
        self.real = real

    def forward(self, x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.real(x, torch.zeros_like(position_ids))
        return torch.ones_like(cos), torch.zeros_like(sin)


class _Extension:
    """What one model needs: its settings, what to put back, and the current forward pass."""

    def __init__(self, model: PreTrainedModel, inner: nn.Module, config: LambdaConfig):
        self.model, self.inner, self.config = model, inner, config
        self.rotary: nn.Module = inner.rotary_emb  # type: ignore[assignment]
        self.layers = [module for module in inner.modules() if hasattr(module, "layer_idx")]
        own = {getattr(layer, "sliding_window", None) for layer in self.layers}
        self.mixed = None in own and len(own) > 1
        self.implementation: Any = model.config._attn_implementation
        self.positions: Tensor | None = None
        self.cache: Cache | None = None
        self.calls = 0
        inner.rotary_emb = _StillRotary(self.rotary)
        for module in (inner, *self.layers):
            object.__setattr__(module, EXTENDED, self)
        self.handles = [
            inner.register_forward_pre_hook(self.begin, with_kwargs=True),
            inner.register_forward_hook(self.end, always_call=True),
        ]
        model.set_attn_implementation(_NAME)

    def undo(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.inner.rotary_emb = self.rotary
        for module in (self.inner, *self.layers):
            object.__delattr__(module, EXTENDED)
        self.model.set_attn_implementation(self.implementation)

    def prove(self, probe: Tensor, expected: Tensor) -> None:
        """With a window over the whole probe nothing may change, and every layer must come by."""
        config, self.config = self.config, LambdaConfig(window=_PROBE, sinks=1)
        self.calls = 0
        try:
            with frozen(self.model):
                output = self.inner(input_ids=probe, use_cache=False).last_hidden_state
        finally:
            self.config = config
        expected, output = expected.double(), output.double()
        far = float((output - expected).norm() / expected.norm())
        tolerance = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 5e-2
        if self.calls != len(self.layers) or not far <= tolerance:
            raise UnsupportedModelError(
                f"Lambda attention must be reached in all {len(self.layers)} layers of "
                f"{type(self.model).__name__} and agree with its own attention within its window, "
                f"but it was reached {self.calls} times and is off by {far:.1e}; "
                "use a model that is loaded with its own unpatched attention"
            )

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the body runs: positions of the tokens, and a cache of the right kind."""
        given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        cache = given.get("past_key_values")
        use_cache = given.get("use_cache")
        if cache is None and (module.config.use_cache if use_cache is None else use_cache):  # type: ignore[union-attr]
            cache = Cache(layers=self.new_layers())
        elif cache is not None:
            self.adopt(cache)
        past = 0 if cache is None else int(cache.get_seq_length())
        self.positions = _positions(tokens, given.get("attention_mask"), past, cache)
        _check_positions(given.get("position_ids"), self.positions)
        self.cache = cache
        if cache is not None:
            layers: Any = cache.layers
            for layer in layers:
                layer.incoming = self.positions
        return (), {**given, "past_key_values": cache}

    def end(self, *_: Any) -> None:
        # positions stay: gradient checkpointing runs the layers once more
        self.cache = None

    def new_layers(self) -> list[Any]:
        return [WindowLayer(self.config) for _ in self.layers]

    def adopt(self, cache: Cache) -> None:
        """Turn an empty growing cache into one of constant size; check any other."""
        layers = getattr(cache, "layers", None)
        if layers and all(isinstance(layer, WindowLayer) for layer in layers):
            if layers[0].config != self.config:
                raise InputError(
                    f"the cache must come from this model's settings {self.config}, got one of "
                    f"{layers[0].config}; start with a new cache"
                )
            return
        growing = layers is not None and all(isinstance(layer, DynamicLayer) for layer in layers)
        if not growing or cache.get_seq_length():
            raise InputError(
                "an extended model needs a cache that it started itself or an empty DynamicCache, "
                f"got a {type(cache).__name__}; pass none and let it make one"
            )
        layers[:] = self.new_layers()  # type: ignore[index]

    def rotate(self, attention: nn.Module) -> Any:
        apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb

        def turn(x: Tensor, positions: Tensor) -> Tensor:
            cos, sin = self.rotary(x, positions)
            turned = x[..., : cos.shape[-1]]
            # the function wants a query and a key; a key without heads costs nothing
            turned, _ = apply(turned, turned[:, :0], cos, sin)
            return torch.cat([turned, x[..., cos.shape[-1] :]], dim=-1)

        return turn


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    extension: _Extension | None = getattr(module, EXTENDED, None)
    if extension is None or extension.positions is None:
        raise UnsupportedModelError(
            f"the attention {_NAME!r} works only inside a model that extend_context prepared, got "
            f"a bare {type(module).__name__}; load the model with its own attention and extend it"
        )
    if dropout:
        raise UnsupportedModelError(
            f"Lambda attention has no dropout, but the model asks for {dropout}; set "
            "attention_dropout to 0 or call model.eval()"
        )
    extension.calls += 1
    config = extension.config
    if extension.cache is None:
        keys = Keys(key, value, extension.positions)
        sinks = first_keys(keys, config.sinks)
    else:
        layer: Any = extension.cache.layers[module.layer_idx]  # type: ignore[index]
        sinks, keys = layer.split(key, value, layer.seen)
    if sliding_window is not None and extension.mixed:
        # a layer that was trained to see no further than its own window goes on so
        config = LambdaConfig(window=min(sliding_window, config.window), sinks=0)
        sinks = sinks.narrow(0, 0)
    output = window_attention(
        query,
        extension.positions,
        keys,
        sinks,
        config,
        rotate=extension.rotate(module),
        scale=scaling,
        softcap=softcap,
    )
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Positions say what is padding; no mask tensor is needed."""
    return None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _no_mask)


def _positions(tokens: Tensor, mask: Tensor | None, past: int, cache: Cache | None) -> Tensor:
    """``(rows, new)``: how many real tokens came before, -1 for padding."""
    rows, new = tokens.shape[:2]
    if mask is None:
        count = torch.arange(new, device=tokens.device).expand(rows, -1)
        if cache is None or not past:
            return count
        kept: Tensor = cache.layers[0].positions  # type: ignore[attr-defined]
        return count + (kept.amax(-1, keepdim=True) + 1 if kept.shape[1] else past)
    if not isinstance(mask, Tensor) or mask.shape != (rows, past + new):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            "attention_mask must be (rows, tokens so far) with 1 for tokens and 0 for padding, "
            f"here {(rows, past + new)}, got {shape}; packed and four-dimensional masks do not "
            "work with an extended model"
        )
    real = mask.to(device=tokens.device, dtype=torch.bool)
    return torch.where(real, real.long().cumsum(-1) - 1, -1)[:, past:]


def _check_positions(position_ids: Tensor | None, positions: Tensor) -> None:
    """Positions that are given must run as those that were counted."""
    if position_ids is None:
        return
    real = positions >= 0
    offset = position_ids.to(positions) - positions
    low = torch.where(real, offset, torch.iinfo(offset.dtype).max).amin(-1)
    high = torch.where(real, offset, torch.iinfo(offset.dtype).min).amax(-1)
    if bool((low < high).any()):
        raise InputError(
            "position_ids must rise by one from token to token in an extended model, but they "
            "jump; give one sequence per row and mark padding in attention_mask"
        )


def _check_model(model: PreTrainedModel, config: LambdaConfig) -> None:
    family = model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"extend_context knows the families {', '.join(FAMILIES)}, got {family!r}; use a "
            "model of one of them"
        )
    settings = model.config.rope_parameters or {}
    rope = settings.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"the rotary scaling must be one of {', '.join(_ROPE_TYPES)}, whose frequencies do "
            f"not depend on the length, got {rope!r}; set rope_parameters in the config"
        )
    own = getattr(model.config, "sliding_window", None)
    everywhere = len(set(getattr(model.config, "layer_types", None) or ())) < 2
    if everywhere and own is not None and config.window > own:
        raise InputError(
            f"window must not exceed the model's own sliding window of {own}, got "
            f"{config.window}; choose a smaller window"
        )
