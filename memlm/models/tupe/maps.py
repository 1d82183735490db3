"""What a model's positions look like: one map of scores per head, free of any input.

A head is named by where its position scores alone would look (softmax over keys, the mean over
queries, untied tokens left out), after the patterns that Ke et al. (2021, figure 5) show:

    previous, next   half of the weight on the token before, after
    local            half of it within an eighth of the length
    global           nearly even: entropy above 95 % of the greatest
    broad            anything else

A decoder's heads see the past only: later keys have the score -inf.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import UnsupportedModelError
from memlm.core.optional import require
from memlm.ops.untied_attention import position_scores
from memlm.positions.untied import UntiedPositions


class PositionMaps(NamedTuple):
    """Position scores of a model.

    Attributes:
        scores: ``(heads, length, length)`` float32, [head, query, key].
        labels: what each head does.
    """

    scores: Tensor
    labels: tuple[str, ...]


@torch.no_grad()
def position_maps(model: torch.nn.Module, length: int) -> PositionMaps:
    """The maps of a model that scores positions apart.

    Args:
        model: holds one `UntiedPositions`.
        length: tokens.

    Raises:
        UnsupportedModelError: if it holds none.
        InputError: if ``length`` is below 3 or more than the model can.
    """
    check(length >= 3, f"length must be at least 3, got {length}")
    for module in model.modules():
        if isinstance(module, UntiedPositions):
            found = position_scores(module(length), length, module.scale)[0].float().cpu()
            if not module.bidirectional:
                past = torch.ones(length, length, dtype=torch.bool).tril()
                found = found.masked_fill(~past, -torch.inf)
            return PositionMaps(found, tuple(label_of(one) for one in found))
    raise UnsupportedModelError(
        "the model must score positions apart (TUPE, BERT-R, BERT-A^d), but holds no such part"
    )


def label_of(scores: Tensor) -> str:
    """The name of one head's ``(length, length)`` map."""
    inner = scores[1:, 1:].double()
    length = len(inner)
    weights = inner.softmax(-1)
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]

    def share(at: Tensor) -> float:
        asks = at.any(-1)  # the first token has none before it
        return float((weights * at).sum(-1)[asks].mean())

    if share(offset == -1) > 0.5:
        return "previous"
    if share(offset == 1) > 0.5:
        return "next"
    entropy = float(torch.special.entr(weights).sum(-1).mean())
    seen = (~torch.isneginf(inner)).sum(-1)
    if entropy > 0.95 * float(seen.double().log().mean()):
        return "global"
    return "local" if share(offset.abs() <= max(1, length // 8)) > 0.5 else "broad"


def draw_maps(maps: PositionMaps, path: str | Path) -> None:
    """One image per head: the weights that position scores alone would give.

    Args:
        maps: from `position_maps`.
        path: picture to write (.png, .svg, .pdf).

    Raises:
        MissingExtraError: without matplotlib.
        InputError: if ``path`` ends in no kind of picture that matplotlib writes.
    """
    require("matplotlib", extra="plot", purpose="draw maps")
    from matplotlib.figure import Figure

    heads = len(maps.labels)
    columns = min(4, heads)
    rows = -(-heads // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    for number, axis in enumerate(axes.flat):
        if number >= heads:
            axis.set_axis_off()
            continue
        weights = maps.scores[number].softmax(-1).numpy()
        # from zero, so that an even head looks even
        image = axis.imshow(weights, cmap="viridis", vmin=0.0)
        figure.colorbar(image, ax=axis, shrink=0.7)
        axis.set_title(f"head {number}: {maps.labels[number]}")
        axis.set_xlabel("key position")
        axis.set_ylabel("query position")
    figure.suptitle("weight of every key, by position alone")
    kinds = figure.canvas.get_supported_filetypes()
    check(
        Path(path).suffix.removeprefix(".").lower() in kinds,
        f"a picture must end in one of {', '.join(sorted(kinds))}, got {str(path)!r}",
    )
    figure.savefig(path, bbox_inches="tight")  # labels below included
