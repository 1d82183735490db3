"""How much of RETRO's gain is copying (Borgeaud et al. 2022, section 2.8 and figure 6).

    r(C)        = longest run of tokens that chunk C shares with its neighbours / |C|
    bpb(alpha)  = bits of all chunks with r(C) <= alpha / bytes of all these chunks

bpb(1) is the usual figure. A model that only copied would be no better than without retrieval at
small alpha; the paper reads alpha = 12.5 % (8 of 64 tokens) as "no leakage".
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.optional import require
from memlm.evaluation.retro import RetroEvaluation
from memlm.retrieval.dataset import RetroDataset
from memlm.retrieval.overlap import chunk_overlaps

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


class LeakageRow(NamedTuple):
    """Chunks up to one overlap.

    Attributes:
        alpha: the most overlap a chunk has.
        share: of the scored tokens that are in such chunks.
        bits_per_byte: by name of the evaluation; NaN without chunks.
        bucket: bits per byte of the chunks of this overlap alone (above the alpha before), by name.
    """

    alpha: float
    share: float
    bits_per_byte: dict[str, float]
    bucket: dict[str, float]


def leakage(
    evaluations: Mapping[str, RetroEvaluation],
    data: RetroDataset,
    *,
    k: int | None = None,
    alphas: Sequence[float] = ALPHAS,
) -> list[LeakageRow]:
    """bpb(alpha) of several evaluations of one text.

    Args:
        evaluations: of the data, by name, e.g. from `memlm.evaluation.retro.compare_retrieval`.
        data: what was evaluated, with the neighbours whose overlap is measured.
        k: neighbours looked at; None: all of the table (the paper looks at 10).
        alphas: rising, from above 0 to 1.

    Raises:
        InputError: if the data have no neighbours, or alphas do not rise to at most 1.
    """
    check(
        list(alphas) == sorted(set(alphas))
        and len(alphas) > 0
        and 0 < alphas[0] <= alphas[-1] <= 1,
        f"alphas must rise from above 0 to at most 1, got {list(alphas)}",
    )
    table = data.neighbours
    if table is None:
        raise InputError(
            "overlap is that of chunks with their neighbours, but the data have none; give a table"
        )
    tokens = next(iter(evaluations.values())).chunk_tokens
    scored = np.flatnonzero(tokens)
    overlaps = chunk_overlaps(data.text, table, data.database, scored, k=k)
    total = tokens.sum()
    rows, before = [], -1.0
    for alpha in alphas:
        upto, bucket = scored[overlaps <= alpha], scored[(overlaps > before) & (overlaps <= alpha)]
        rows.append(
            LeakageRow(
                alpha,
                float(tokens[upto].sum() / total),
                {name: _bits_per_byte(one, upto) for name, one in evaluations.items()},
                {name: _bits_per_byte(one, bucket) for name, one in evaluations.items()},
            )
        )
        before = alpha
    return rows


def leakage_table(rows: Sequence[LeakageRow]) -> str:
    """The curve as lines of text: of all chunks up to alpha, and in brackets of those at alpha."""
    names = list(rows[0].bits_per_byte)
    lines = [f"{'overlap <=':<12}{'tokens':>8}" + "".join(f"{name:>20}" for name in names)]
    for row in rows:
        cells = "".join(
            f"{row.bits_per_byte[name]:>11.4f} ({row.bucket[name]:.4f})" for name in names
        )
        lines.append(f"{row.alpha:<12.1%}{row.share:>8.1%}{cells}")
    lines.append("bits per byte of chunks up to this overlap (of those in this bucket alone)")
    return "\n".join(lines)


def plot_leakage(rows: Sequence[LeakageRow], path: str | Path) -> Path:
    """Draw bpb(alpha), one line per evaluation, into a file (.svg, .png, .pdf).

    Raises:
        MissingExtraError: without matplotlib.
    """
    require("matplotlib", extra="plot", purpose="draw the leakage curve")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name in rows[0].bits_per_byte:
        axes.plot(
            [row.alpha for row in rows],
            [row.bits_per_byte[name] for row in rows],
            marker="o",
            label=name,
        )
    axes.set_xlabel("largest overlap of a chunk with its neighbours")
    axes.set_ylabel("bits per byte")
    axes.legend()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _bits_per_byte(evaluation: RetroEvaluation, chunks: NDArray[np.int64]) -> float:
    size = float(evaluation.chunk_bytes[chunks].sum())
    if not size:
        return math.nan
    return float(evaluation.chunk_nats[chunks].sum()) / math.log(2) / size
