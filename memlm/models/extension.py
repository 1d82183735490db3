"""The machinery of an extended model: how Lambda attention gets into every layer, and out again.

Through public seams only:

* an attention function and a mask function are registered under one name and selected with
  ``set_attn_implementation``; families that ignore it get adapters (`memlm.models.adapters`);
* the rotary module is wrapped, so that keys arrive and are cached unrotated; they are rotated in
  the attention by the model's own rotary module and function, relative to the window;
* a hook on the body counts positions (padding does not count) and puts `WindowLayer`s into an
  empty cache, so that ``generate`` needs no new argument.

The attention is chosen in the configuration, which models made of one configuration share, so an
extended model gets a copy of its own.

A layer that was trained with a sliding window of its own, in a model that mixes sliding and full
layers, keeps it and gets no sinks: from beyond its window it has never seen anything. Layers
without any position (NoPE) are neither rotated nor limited; they see the same keys.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.models import extend_probe
from memlm.models.adapters import ADAPTERS, adapt, give_back
from memlm.models.extend_chunks import CHUNK, ChunkedReading
from memlm.models.extend_families import FAMILIES, has_rotation, own_window, takes_layer_type
from memlm.models.middle_cache import MiddleLayer
from memlm.models.middle_store import MiddleStore
from memlm.models.running import EXTENDED
from memlm.models.window_cache import WindowLayer
from memlm.ops.dense_distance import DenseConfig, dense_attention
from memlm.ops.middle_rule import MiddleConfig
from memlm.ops.window_attention import (
    Impl,
    Keys,
    LambdaConfig,
    Rotate,
    sink_keys,
    window_attention,
)

_NAME = "memlm_window"
_ADAPTED = "memlm_window_adapted"


class Extension:
    """What one model needs: its settings, what to put back, and the current forward pass.

    Attributes:
        config: what layers see: Lambda attention, or everything at limited distances.
        middle: which middle tokens they see besides; None: none.
        impl: of `memlm.ops.window_attention.window_attention`, for more than one token.
        layers: the attention modules, in order.
        settings: what ``extend_context`` was called with, to save it beside a model.
        watch: called with every layer's queries and keys as they attend:
            ``watch(layer, query, keys, how)``; None: nobody looks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inner: nn.Module,
        config: LambdaConfig | DenseConfig,
        middle: MiddleConfig | None = None,
        chunk: int = CHUNK,
        impl: Impl = "auto",
    ):
        self.model, self.inner, self.config = model, inner, config
        self.middle = middle
        self.settings: dict[str, Any] = {}
        self.impl: Impl = impl
        _own_config(model)
        self.family: str = model.config.model_type
        self.implementation: Any = model.config._attn_implementation
        self.rotary: Any = getattr(inner, "rotary_emb", None)
        self.arguments = list(inspect.signature(inner.forward).parameters)
        self.positions: Tensor | None = None
        self.cache: Cache | None = None
        self.watch: Callable[[nn.Module, Tensor, Keys, dict[str, Any]], None] | None = None
        self.adapters = adapt(inner, self.family) if self.family in ADAPTERS else []
        self.layers = attention_layers(inner)
        windows = {own_window(layer) for layer in self.layers}
        self.mixed = None in windows and len(windows) > 1
        self._by_kind = not self.adapters and takes_layer_type(self.rotary)
        homes = {type(getattr(layer, "real", layer)).__module__ for layer in self.layers}
        self._applied: dict[str, Any] = {
            home: getattr(sys.modules[home], "apply_rotary_pos_emb", None) for home in homes
        }
        for module in (inner, *self.layers):
            object.__setattr__(module, EXTENDED, self)
        self.handles = [
            inner.register_forward_pre_hook(self.begin, with_kwargs=True),
            inner.register_forward_hook(self.end, always_call=True),
            model.register_forward_pre_hook(
                ChunkedReading(self, max(chunk, config.window)).begin, with_kwargs=True
            ),
        ]
        if self.adapters:
            # ``set_attn_implementation`` would only warn; here it is masks that it selects
            model.config._attn_implementation = _ADAPTED
        else:
            inner.rotary_emb = _StillRotary(self.rotary)
            model.set_attn_implementation(_NAME)

    def undo(self) -> None:
        """Put everything back."""
        for handle in self.handles:
            handle.remove()
        for module in (self.inner, *self.layers):
            object.__delattr__(module, EXTENDED)
        if self.adapters:
            give_back(self.adapters)
            self.model.config._attn_implementation = self.implementation
        else:
            self.inner.rotary_emb = self.rotary
            self.model.set_attn_implementation(self.implementation)

    def prove(self, probe: extend_probe.Probe) -> None:
        """Run the probe; see `memlm.models.extend_probe`.

        Raises:
            UnsupportedModelError: if a test fails.
        """
        config, middle, reached = self.config, self.middle, []
        self.middle, self.watch = None, lambda layer, *_: reached.append(layer.layer_idx)
        impl, self.impl = self.impl, "auto"
        self.config = LambdaConfig(window=probe.tokens.shape[1], sinks=0)
        try:
            states = extend_probe.run(self.model, self.inner, probe.tokens)
            extend_probe.check_reached(self.model, reached)
            extend_probe.check_agreement(self.model, probe, states)
            self.config = extend_probe.TRUNCATION
            extend_probe.check_truncation(self.model, self.inner, probe)
        except UnsupportedModelError:
            raise
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            if self.family in FAMILIES:
                raise
            raise UnsupportedModelError(
                f"attention of the unknown family {self.family!r} must work as that of the known "
                f"ones does, but a trial failed ({error}); use a model of another family"
            ) from error
        finally:
            self.config, self.middle, self.watch, self.impl = config, middle, None, impl

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the body runs: positions of the tokens, and a cache of the right kind."""
        given = {**dict(zip(self.arguments, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = given["inputs_embeds"] if tokens is None else tokens
        cache = given.get("past_key_values")
        use_cache = given.get("use_cache")
        use_cache = module.config.use_cache if use_cache is None else use_cache  # type: ignore[union-attr]
        if isinstance(self.config, DenseConfig):
            if cache is not None or use_cache:
                raise InputError(
                    "attention to every earlier key keeps no cache in an extended model, but one "
                    "was asked for; pass use_cache=False"
                )
        elif cache is not None:
            self.adopt(cache)
        elif use_cache and not _is_checkpointed(module):
            cache = Cache(layers=self.new_layers())
        self.positions = _positions(tokens, given.get("attention_mask"), cache)
        if not torch.compiler.is_compiling():
            _check_positions(given.get("position_ids"), self.positions)
        self.cache = cache
        if given.get("document_ids") is not None:
            raise InputError(
                "an extended model reads one document per row, got document_ids; read documents "
                "apart (packed=False) and mark padding in attention_mask"
            )
        if self.adapters and not self.adapters[0][2].needs_mask:
            # these bodies build ALiBi for as many tokens as the mask has; adapters do not use it
            given["attention_mask"] = torch.ones_like(self.positions)
        return (), {**given, "past_key_values": cache}

    def end(self, *_: Any) -> None:
        """After the body ran."""
        # positions stay: gradient checkpointing runs the layers once more
        self.cache = None

    def new_layers(self) -> list[Any]:
        """Empty cache layers, one for every layer of the model."""
        each = [(self.seen_by(layer), self.middle_of(layer)) for layer in self.layers]
        return [MiddleLayer(seen, middle) if middle else WindowLayer(seen) for seen, middle in each]

    def seen_by(self, layer: nn.Module) -> LambdaConfig:
        """What one layer sees."""
        config: Any = self.config
        own = own_window(layer)
        if self.mixed and own is not None:
            return LambdaConfig(window=min(own, config.window), sinks=0)
        return config

    def middle_of(self, layer: nn.Module) -> MiddleConfig | None:
        """Which middle tokens one layer sees."""
        if self.middle is None or (self.mixed and own_window(layer) is not None):
            return None
        return self.middle if layer.layer_idx in self.middle.layers(len(self.layers)) else None

    def adopt(self, cache: Cache) -> None:
        """Turn an empty growing cache into one of constant size; check any other."""
        layers = getattr(cache, "layers", None)
        if layers and all(isinstance(layer, WindowLayer) for layer in layers):
            theirs = [(layer.config, getattr(layer, "middle", None)) for layer in layers]
            ours = [(self.seen_by(layer), self.middle_of(layer)) for layer in self.layers]
            if theirs != ours:
                raise InputError(
                    f"the cache must come from this model's settings {ours[-1]}, got one of "
                    f"{theirs[-1]}; start with a new cache"
                )
            return
        growing = layers is not None and all(isinstance(layer, DynamicLayer) for layer in layers)
        if not growing or cache.get_seq_length():
            raise InputError(
                "an extended model needs a cache that it started itself or an empty DynamicCache, "
                f"got a {type(cache).__name__}; pass none and let it make one"
            )
        layers[:] = self.new_layers()  # type: ignore[index]

    @property
    def is_piecewise(self) -> bool:
        """Whether a text read in pieces gives what it gives as a whole."""
        if isinstance(self.config, DenseConfig) or self.watch is not None:
            return False
        last = self.middle is not None and self.middle.rule == "last"
        return self.config.clamp != "original" and not last

    def rotation(self, layer: nn.Module) -> Rotate:
        """The model's own rotation of ``(batch, heads, time, dim)`` in one of its layers."""
        # an adapter's function is found beside the module that it replaces
        home = type(getattr(layer, "real", layer)).__module__
        apply: Callable[..., Any] = self._applied[home]
        kind = (layer.layer_type,) if self._by_kind else ()

        def turn(x: Tensor, positions: Tensor) -> Tensor:
            cos, sin = self.rotary(x, positions, *kind)
            turned = x[..., : cos.shape[-1]]
            # the function wants a query and a key; a key without heads costs nothing
            turned, _ = apply(turned, turned[:, :0], cos, sin)
            return torch.cat([turned, x[..., cos.shape[-1] :]], dim=-1)

        return turn

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        dropout: float = 0.0,
        **how: Any,
    ) -> Tensor:
        """Attention of one layer on unrotated keys, over them and what its cache holds.

        Args:
            layer: one of ``layers``.
            query: ``(batch, heads, new, dim)``.
            key: ``(batch, key heads, new, dim)``.
            value: ``(batch, key heads, new, dim)``.
            dropout: of the original.
            how: rotation, slopes, scale and soft-cap, as in ``window_attention``.

        Raises:
            UnsupportedModelError: for dropout in training.
        """
        if dropout and layer.training:
            raise UnsupportedModelError(
                f"Lambda attention has no dropout, but the model asks for {dropout}; set "
                "attention_dropout to 0 or call model.eval()"
            )
        positions: Tensor = self.positions  # type: ignore[assignment]
        index: int = layer.layer_idx  # type: ignore[assignment]
        keys = Keys(key, value, positions)
        if self.watch is not None:
            self.watch(layer, query, keys, how)
        if isinstance(self.config, DenseConfig):
            return dense_attention(query, positions, keys, self.config, **how)
        config = self.seen_by(layer)
        if self.cache is not None:
            layers: Any = self.cache.layers
            return layers[index].attend(query, keys, impl=self.impl, **how)
        middle = self.middle_of(layer)
        if middle is not None:
            store = MiddleStore(replace(middle, offload=False), config)
            how["other"] = store.attend(query, keys, **how)
        sinks = sink_keys(keys, config)
        return window_attention(query, positions, keys, sinks, config, impl=self.impl, **how)


class _StillRotary(nn.Module):
    """The rotary module at position 0, without its scale: multiplying by it changes nothing."""

    def __init__(self, real: nn.Module):
        super().__init__()
        self.real = real

    def forward(
        self, x: Tensor, position_ids: Tensor, *kind: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self.real(x, torch.zeros_like(position_ids), *kind, **named)
        return torch.ones_like(cos), torch.zeros_like(sin)


def _own_config(model: PreTrainedModel) -> None:
    """Give ``model`` and its parts a copy of their configuration, shared with no other model."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = copies.get(id(getattr(module, "config", None)))
        if own is not None:
            module.config = own


def attention_layers(inner: nn.Module) -> list[nn.Module]:
    """The innermost modules that know the number of their layer."""
    numbered = [module for module in inner.modules() if hasattr(module, "layer_idx")]
    outer = {
        module
        for module in numbered
        if any(hasattr(part, "layer_idx") for part in module.modules() if part is not module)
    }
    return [module for module in numbered if module not in outer]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    extension: Extension | None = getattr(module, EXTENDED, None)
    if extension is None or extension.positions is None:
        raise UnsupportedModelError(
            f"the attention {_NAME!r} works only inside a model that extend_context prepared, got "
            f"a bare {type(module).__name__}; load the model with its own attention and extend it"
        )
    if s_aux is not None:
        raise UnsupportedModelError(
            "the softmax must be over keys alone, but the model has a learnt sink score in every "
            f"head ({type(module).__name__}); use a model without"
        )
    rotated = has_rotation(module, extension.family)
    output = extension.attend(
        module,
        query,
        key,
        value,
        rotate=extension.rotation(module) if rotated else None,
        scale=scaling,
        softcap=softcap,
        dropout=dropout,
    )
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """Positions say what is padding; no mask tensor is needed."""
    return None


def _empty_mask(*_: Any, **__: Any) -> Tensor:
    """The same for bodies that need a tensor, which adapters ignore."""
    return torch.zeros(())


AttentionInterface.register(_NAME, _attention)
AttentionInterface.register(_ADAPTED, _attention)
AttentionMaskInterface.register(_NAME, _no_mask)
AttentionMaskInterface.register(_ADAPTED, _empty_mask)


def _is_checkpointed(module: nn.Module) -> bool:
    """Whether layers run twice, so that a cache would take in every token twice."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))


def _positions(tokens: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
    """``(rows, new)``: how many real tokens came before, -1 for padding."""
    rows, new = tokens.shape[:2]
    if mask is None:
        count = torch.arange(new, device=tokens.device).expand(rows, -1)
        layer: Any = cache.layers[0] if cache is not None else None
        if layer is None or not layer.is_initialized:
            return count
        return count + layer.positions.amax(-1, keepdim=True) + 1
    compiling = torch.compiler.is_compiling()
    past = 0 if cache is None or compiling else int(cache.get_seq_length())
    total = mask.shape[-1] if compiling else past + new
    if not isinstance(mask, Tensor) or mask.shape != (rows, total):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            "attention_mask must be (rows, tokens so far) with 1 for tokens and 0 for padding, "
            f"here {(rows, total)}, got {shape}; packed and four-dimensional masks do not "
            "work with an extended model"
        )
    real = mask.to(device=tokens.device, dtype=torch.bool)
    return torch.where(real, real.long().cumsum(-1) - 1, -1)[:, -new:]


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
