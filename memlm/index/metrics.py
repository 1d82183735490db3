"""Three ways to say near, all with one sign: a higher score is nearer.

    l2       -|q - x|^2              (kNN-LM; the *squared* distance, no root)
    ip       q . x
    cosine   q . x / (|q| |x|)

Keys and queries are checked here, once, for every index: shape, finiteness, and for the cosine a
direction to compare.

Differs from the papers' code: knn-transformers negates dot products as if they were distances,
and both originals hand half-precision queries to FAISS, which fails; here queries are cast.
"""

from difflib import get_close_matches

import torch
from torch import Tensor

from memlm.core.config import check

METRICS = ("l2", "ip", "cosine")


def check_choice(what: str, got: str, choices: tuple[str, ...]) -> None:
    """Raise InputError with the nearest valid name unless ``got`` is one of ``choices``."""
    near = get_close_matches(str(got), choices, n=1, cutoff=0.4)
    hint = f"did you mean '{near[0]}'?" if near else "use one of these"
    check(got in choices, f"{what} must be one of {', '.join(choices)}, got '{got}'; {hint}")


def prepare_queries(queries: Tensor, dim: int, metric: str, dtype: torch.dtype | None = None):
    """Queries as an index compares them.

    Args:
        queries: ``(queries, dim)``, any floating dtype and device.
        dim: width of the indexed keys.
        metric: "cosine" scales every query to length one.
        dtype: what to cast to; None: float64 stays, everything else becomes float32.

    Raises:
        InputError: for another shape, a non-finite value, or a zero query under "cosine".
    """
    check(
        queries.dim() == 2 and queries.shape[-1] == dim,
        f"queries must be (queries, {dim}) like the indexed keys, got {tuple(queries.shape)}; "
        "search with states of the model and tap that the keys came from",
    )
    if dtype is None:
        dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    queries = queries.detach().to(dtype)
    finite = torch.isfinite(queries).all(-1)
    check(
        bool(finite.all()),
        f"queries must be finite, but {int((~finite).sum())} of {len(queries)} are not; run the "
        "model in float32 or bfloat16",
    )
    if metric == "cosine":
        norms = torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
        check_directions(norms.squeeze(-1), "query")
        queries = queries / norms
    return queries


def prepare_keys(keys: Tensor, metric: str, start: int | None = None) -> Tensor:
    """Keys ``(rows, dim)`` in float32, scaled to length one for "cosine"; raises as `key_norms`."""
    norms = key_norms(keys, metric, start)
    return keys.float() / norms.unsqueeze(-1) if metric == "cosine" else keys.float()


def key_norms(keys: Tensor, metric: str, start: int | None = None) -> Tensor:
    """Lengths of keys, checked.

    Args:
        keys: ``(rows, dim)``.
        metric: "cosine" refuses keys of length zero.
        start: number of the first key, for the message; None: unknown.

    Returns:
        ``(rows,)`` float32.

    Raises:
        InputError: for non-finite keys, or zero keys under "cosine".
    """
    norms = torch.linalg.vector_norm(keys.float(), dim=-1)
    finite = torch.isfinite(norms)
    if not finite.all():
        check(
            False,
            f"keys must be finite, but {int((~finite).sum())} are not"
            f"{_first(~finite, 'key', start)}; extract the store again in bfloat16 or float32",
        )
    if metric == "cosine":
        check_directions(norms, "key", start)
    return norms


def check_directions(norms: Tensor, what: str, start: int | None = 0) -> None:
    """Raise InputError if a norm is zero: the cosine with a zero vector is undefined.

    Args:
        norms: ``(rows,)``.
        what: "key" or "query", for the message.
        start: number of the first row, for the message; None: unknown.
    """
    zero = norms == 0
    if zero.any():
        check(
            False,
            f"metric 'cosine' needs non-zero vectors, but {int(zero.sum())} are zero"
            f"{_first(zero, what, start)}; use metric 'l2' or 'ip'",
        )


def _first(bad: Tensor, what: str, start: int | None) -> str:
    return "" if start is None else f" (first: {what} {start + int(bad.nonzero()[0])})"


def check_k(k: int) -> None:
    """Raise InputError unless at least one neighbour is asked for."""
    check(k >= 1, f"k must be at least 1, got {k}")
