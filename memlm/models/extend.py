"""Extending the context of a model: Lambda attention in place, without training, reversible.

A model with relative positions fails beyond the length it was trained on because distances, and
the number of tokens that share the attention, are new to it. LM-Infinite (Han et al. 2024) keeps
both familiar: every layer sees the last `window` tokens at their true distance and the first
`sinks` ones at no more than `distance_limit` (see `memlm.ops.window_attention`). Time is linear in
the length and the cache is constant.

`memlm.models.extend_families` says which models it works for, `memlm.models.extension` how it
reaches them, and `memlm.models.extend_probe` proves that it did. ``restore_context`` puts the
identical objects back.

Differs from the paper's code: any family with rotary positions or ALiBi, grouped keys, padding on
either side and batches, and a cache that does not grow.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from memlm.core.errors import InputError
from memlm.models.extend_chunks import CHUNK
from memlm.models.extend_families import (
    FAMILIES,
    check_family,
    check_window,
    own_window,
    uniform_window,
)
from memlm.models.extend_probe import look
from memlm.models.extension import Extension, attention_layers
from memlm.models.running import EXTENDED
from memlm.models.taps import body
from memlm.ops.dense_distance import DenseConfig
from memlm.ops.lambda_rule import Clamp, LambdaConfig
from memlm.ops.middle_rule import MiddleConfig
from memlm.ops.window_attention import Impl


def extend_context(
    model: PreTrainedModel,
    *,
    window: int,
    sinks: int | Sequence[tuple[int, int]] = 10,
    distance_limit: int | Literal["window"] | None = "window",
    clamp: Clamp = "causal",
    middle: Literal["dropped", "kept"] | MiddleConfig = "dropped",
    triangle_offset: float = 0.0,
    chunk: int = CHUNK,
    impl: Impl = "auto",
) -> PreTrainedModel:
    """Let ``model`` read and write texts of any length, in place (LM-Infinite, Han et al. 2024).

    Args:
        model: a causal language model of a family in `memlm.models.extend_families.FAMILIES`, or
            of another one with rotary positions that passes the probe; also inside a model with a
            memory (`memlm.models.attach`) or one that learnt to read neighbours
            (`memlm.models.retro.fit`).
        window: tokens seen at their true distance; at most the length the model was trained on.
        sinks: first tokens of the sequence that stay visible; the paper's code uses 10 to 100. To
            pin a system prompt, give the number of its tokens; to pin any spans of positions, pairs
            ``(begin, end)``, as ``[(0, 4), (120, 180)]``: tokens ``begin`` to ``end - 1`` of every
            row, padding not counted.
        distance_limit: largest distance at which sinks are scored; ``"window"``: as the paper's
            code; None: their true distance.
        clamp: ``"causal"``; ``"original"``: the rule of the paper's code; ``"streaming"``: that of
            StreamingLLM, where the default limit is none. See ``LambdaConfig`` and, for
            ``middle="kept"``, ``DenseConfig``.
        middle: ``"dropped"``: tokens between sinks and window are not seen; a ``MiddleConfig``:
            every query sees the few that it selects; ``"kept"``: all are seen, at no more than the
            limit, in time and memory n x n and without a cache: the slower path of the paper's
            code, for comparison.
        triangle_offset: weakens the middle that is kept, see `memlm.ops.dense_distance`.
        chunk: tokens of a prompt that are read at once where only its last logits are asked for, as
            ``generate`` does (`memlm.models.extend_chunks`); never less than the window.
        impl: of the attention over more than one token, see
            `memlm.ops.window_attention.window_attention`.

    Returns:
        The same model.

    Raises:
        InputError: for settings that cannot be, or if the model is extended already.
        UnsupportedModelError: if the family cannot be extended or the probe fails.
    """
    limit = window if distance_limit == "window" else distance_limit
    if clamp == "streaming" and distance_limit == "window":
        limit = None
    config: LambdaConfig | DenseConfig
    first, pinned = _spans(sinks)
    config = LambdaConfig(window, first, limit, clamp, pinned)
    if pinned and middle != "dropped":
        raise InputError(
            f"pinned spans need middle='dropped', since they lie in the middle, got {pinned} and "
            f"{middle!r}; give sinks as a number"
        )
    if middle == "kept":
        rule = "original" if clamp == "original" else "correct"
        config = DenseConfig(window, first, limit, triangle_offset, rule)
    elif not (middle == "dropped" or isinstance(middle, MiddleConfig)) or triangle_offset:
        raise InputError(
            "middle must be 'dropped', a MiddleConfig, or 'kept' for a triangle offset, got "
            f"{middle!r} and {triangle_offset}; pass middle='kept'"
        )
    if is_extended(model):
        raise InputError(
            "the model must not be extended already, but it is; call restore_context(model) first"
        )
    base, inner = _innermost(model), body(model)
    layers = attention_layers(inner)
    check_family(base, inner, layers)
    check_window(base, layers, None if middle == "kept" else window)
    selected = _selected(middle, window, layers)
    probe = look(base, inner, uniform_window(base), base.config.model_type in FAMILIES)
    extension = Extension(base, inner, config, selected, chunk, impl)
    extension.settings = {
        "window": window,
        "sinks": sinks if isinstance(sinks, int) else [list(span) for span in sinks],
        "distance_limit": distance_limit,
        "clamp": clamp,
        "middle": middle.to_dict() if isinstance(middle, MiddleConfig) else middle,
        "triangle_offset": triangle_offset,
        "chunk": chunk,
        "impl": impl,
    }
    try:
        extension.prove(probe)
    except BaseException:
        extension.undo()
        raise
    return model


def _innermost(model: PreTrainedModel) -> PreTrainedModel:
    """The language model itself, inside whatever was put around it."""
    while isinstance(inner := getattr(model, "base", None), PreTrainedModel):
        model = inner
    return model


def _selected(
    middle: str | MiddleConfig, window: int, layers: list[nn.Module]
) -> MiddleConfig | None:
    """What selects middle tokens, if anything does.

    Raises:
        InputError: if it does so in no layer, or in blocks larger than the window.
    """
    if not isinstance(middle, MiddleConfig) or middle.k == 0:
        return None
    if middle.block > window:
        raise InputError(
            f"blocks of middle tokens must not exceed the window of {window}, got {middle.block}; "
            "set a smaller block"
        )
    numbers = range(len(layers))
    full = [number for number in numbers if own_window(layers[number]) is None] or numbers
    if not set(middle.layers(len(layers))) & set(full):
        raise InputError(
            f"middle tokens must be seen in some of the {len(layers)} layers, and in one that does "
            f"not slide if others do, but first_layer is {middle.first_layer} and end_layer "
            f"{middle.end_layer}; set a lower first_layer"
        )
    return middle


def _spans(sinks: int | Sequence[tuple[int, int]]) -> tuple[int, tuple[tuple[int, int], ...]]:
    """How many first tokens are sinks, and which spans behind them.

    Raises:
        InputError: if it is neither a number nor pairs of numbers.
    """
    if isinstance(sinks, int):
        return sinks, ()
    spans = sorted(tuple(span) for span in sinks)
    if not all(len(span) == 2 and all(isinstance(at, int) for at in span) for span in spans):
        raise InputError(
            f"sinks must be a number or pairs (begin, end) of positions, got {sinks!r}; pass "
            "sinks=10 or sinks=[(0, 10), (500, 560)]"
        )
    first = spans.pop(0)[1] if spans and spans[0][0] == 0 else 0
    return first, tuple(spans)  # type: ignore[arg-type]


def restore_context(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``extend_context``: the model's own modules and attention come back.

    Raises:
        InputError: if the model is not extended.
    """
    if not is_extended(model):
        raise InputError("the model must be extended, but it is not; call extend_context(model)")
    getattr(body(model), EXTENDED).undo()
    return model


def extension_settings(model: PreTrainedModel) -> dict[str, Any] | None:
    """What ``extend_context`` was called with, ready for JSON; None if it is not in force."""
    return dict(getattr(body(model), EXTENDED).settings) if is_extended(model) else None


def extend_again(model: PreTrainedModel, settings: dict[str, Any]) -> PreTrainedModel:
    """``extend_context`` with what `extension_settings` told."""
    middle = settings["middle"]
    selected = middle if isinstance(middle, str) else MiddleConfig.from_dict(middle)
    return extend_context(model, **{**settings, "middle": selected})


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
