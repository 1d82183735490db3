"""The attention scores of some queries of a model, layer by layer, in any family.

A score is what the softmax gets: scaled, with ALiBi's bias or behind a soft-cap. Models return
their probabilities at best, and only with slow attention, so scores are computed beside the
model's own forward pass, for the queries that are asked about. The place where all families meet is
the attention of an extended model (`memlm.models.extension`): there a window over the whole text
changes nothing, and queries and keys come by unrotated, together with the way they are scored.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.models.extend import extended
from memlm.models.extend_families import uniform_window
from memlm.models.running import EXTENDED, frozen
from memlm.models.taps import body
from memlm.ops.lambda_rule import Keys, LambdaConfig, Rotate, Scores, grouped_dots

# visit(layer, scores (rows, heads, queries, keys), -inf where a key is not seen)
Visit = Callable[[int, Tensor], None]


def visit_scores(
    model: PreTrainedModel, tokens: Tensor, queries: Tensor, visit: Visit
) -> tuple[Tensor, ...]:
    """Read texts with the model as it is, and look at the scores of some queries in every layer.

    Args:
        model: causal, of a family that can be extended, not extended now; given back as it was.
        tokens: ``(rows, time)`` int64, of any length.
        queries: ``(queries,)`` positions, the same in every row.
        visit: called once per layer, in order, with its number and the scores
            ``(rows, heads, queries, time)``, in float32 at least.

    Returns:
        The hidden states ``(rows, time, dim)`` before the first layer and behind every one.

    Raises:
        InputError: if a position is outside the text, or the model is extended.
        UnsupportedModelError: if the model's family cannot be extended.
    """
    length = tokens.shape[1]
    check(
        queries.numel() > 0 and bool(((queries >= 0) & (queries < length)).all()),
        f"queries must be positions of the text, 0 to {length - 1}, got {queries.tolist()}",
    )
    window = min(length, uniform_window(model) or length)
    with extended(model, window=window, sinks=0):
        inner = body(model)
        extension: Any = getattr(inner, EXTENDED)

        def watch(layer: nn.Module, query: Tensor, keys: Keys, how: dict[str, Any]) -> None:
            asked = queries.to(query.device)
            config = extension.seen_by(layer)
            visit(layer.layer_idx, scores_of(query[:, :, asked], asked, keys, config, **how))  # type: ignore[arg-type]

        extension.watch = watch
        with frozen(model):
            output: Any = inner(
                input_ids=tokens.to(model.device), use_cache=False, output_hidden_states=True
            )
    return output.hidden_states


def scores_of(
    query: Tensor,
    positions: Tensor,
    keys: Keys,
    config: LambdaConfig,
    *,
    rotate: Rotate | None = None,
    slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Scores of queries with every key of a window, at their true distances.

    Args:
        query: ``(rows, heads, queries, dim)``, not rotated.
        positions: ``(queries,)``, the same in every row.
        keys: of the text, in order.
        config: its window is seen; sinks are not.
        rotate: rotary embedding; None for models without.
        slopes: ``(heads,)`` of ALiBi.
        scale: of the dot products; default ``dim ** -0.5``.
        softcap: or None.

    Returns:
        ``(rows, heads, queries, keys)``, -inf where a key is not seen; float32 at least.
    """
    scale = float(query.shape[-1] ** -0.5) if scale is None else scale
    scores = Scores(config, None, rotate, slopes, scale, softcap)
    places = positions.expand(len(query), -1)
    distance = places[:, :, None] - keys.positions[:, None, :]
    seen = (distance >= 0) & (distance < config.window) & (keys.positions >= 0)[:, None]
    work = torch.promote_types(query.dtype, torch.float32)
    turned = scores.turn(query.to(work), places)
    dots = grouped_dots(turned, scores.turn(keys.key.to(work), keys.positions.clamp(min=0)))
    return scores.finish(dots, distance, seen).flatten(1, 2)
