"""Reading a memory for the rows of a forward pass, and merging what it says into their logits.

Two cases. A memory *without* state answers each position on its own: all positions of a batch are
read together, in chunks, padding left out. A memory *with* state walks the text:

    for every position t, in order:
        state = observe(token_t, key_t)            the token that really came
        candidates, state = read(key_t)            what it expects next

also at positions whose logits nobody asked for (``logits_to_keep``), so that a prompt read in one
go, in pieces or token by token leads to the same state. A memory whose ``read`` gives the state
back as it was says so by ``reads_leave_state = True``; it is read only where logits were asked for,
and observes all positions between them at once. So a prompt costs `generate` one read.

Padding and states: a row is *asleep* at a position that is padding. ``observe`` is then called with
the keyword ``valid`` ``(rows, time)``, and must leave sleeping rows as they are; a ``read`` must
not change rows that were asleep at the ``observe`` before it, and what it says about them is
dropped. Without padding the keyword is not passed.

The memory is read without gradient: candidates are constants, and a loss on the merged rows trains
the base model through its logits.
"""

from typing import Any

import torch
from torch import Tensor

from memlm.core.errors import InputError
from memlm.core.merges import Merge
from memlm.core.types import Candidates, TokenMemory
from memlm.ops.merge import merge_logits

_CHUNK_ENTRIES = 1 << 23  # vocabulary scores made at once: 32 MiB in float32


def merge_rows(
    merge: Merge, memory: TokenMemory, logits: Tensor, queries: Tensor, valid: Tensor | None
) -> Tensor:
    """Merge a memory without state into any number of rows.

    Args:
        merge: how.
        memory: its state is None.
        logits: ``(rows, vocab)`` of the model.
        queries: ``(rows, dim)`` tap states at the same positions.
        valid: ``(rows,)`` bool, False for padding, whose logits stay as they are; None: all real.

    Returns:
        ``(rows, vocab)``, at least float32; ``logits`` itself if the memory proposed nothing.
    """
    if valid is not None and not bool(valid.all()):
        chosen = valid.nonzero().squeeze(-1)
        merged = merge_rows(merge, memory, logits[chosen], queries[chosen], None)
        return logits.to(merged.dtype).index_put((chosen,), merged)
    rows = max(1, _CHUNK_ENTRIES // logits.shape[-1])
    merged, spoke = [], False
    for part, query in zip(logits.split(rows), queries.split(rows), strict=True):
        candidates = _read(memory, query, None, logits.device)[0]
        if bool(candidates.valid.any()):
            part, spoke = merge_logits(merge, part, candidates), True
        merged.append(part)
    return torch.cat(merged) if spoke else logits


def walk_rows(
    merge: Merge,
    memory: TokenMemory,
    logits: Tensor,
    tokens: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    kept: list[int],
    state: Any,
) -> tuple[Tensor, Any]:
    """Let a memory with state read a piece of text, and merge it where logits were kept.

    Args:
        merge: how.
        memory: the memory.
        logits: ``(rows, len(kept), vocab)`` of the model.
        tokens: ``(rows, time)`` int64 input tokens.
        keys: ``(rows, time, dim)`` tap states at those tokens.
        valid: ``(rows, time)`` bool, False for padding; None: all real.
        kept: the position in ``time`` of every column of ``logits``.
        state: of the memory before the piece.

    Returns:
        the merged logits, and the state after the piece.
    """
    columns = list(logits.unbind(1))
    wanted: dict[int, list[int]] = {}
    for column, place in enumerate(kept):
        wanted.setdefault(place, []).append(column)
    host = None if valid is None else valid.cpu()
    spoke, begin, last = False, 0, tokens.shape[1] - 1
    only_wanted = getattr(memory, "reads_leave_state", False)
    for time in sorted({*wanted, last}) if only_wanted else range(last + 1):
        here, begin = slice(begin, time + 1), time + 1
        padded = host is not None and not bool(host[:, here].all())
        mask = {"valid": valid[:, here]} if padded else {}  # type: ignore[index]
        with torch.no_grad():
            state = memory.observe(tokens[:, here], keys[:, here].detach(), state, **mask)
        if padded and not bool(host[:, time].any()):  # type: ignore[index]
            continue
        if only_wanted and time not in wanted:
            continue
        candidates, state = _read(memory, keys[:, time], state, logits.device)
        if time not in wanted:
            continue
        if padded:
            awake = mask["valid"][:, -1:].to(logits.device)
            candidates = candidates._replace(valid=candidates.valid & awake)
        if bool(candidates.valid.any()):
            spoke = True
            for column in wanted[time]:
                columns[column] = merge_logits(merge, columns[column], candidates)
    if not spoke:
        return logits, state
    widest = max((column.dtype for column in columns), key=lambda dtype: dtype.itemsize)
    return torch.stack([column.to(widest) for column in columns], dim=1), state


@torch.no_grad()
def _read(
    memory: TokenMemory, query: Tensor, state: Any, device: torch.device
) -> tuple[Candidates, Any]:
    candidates, state = memory.read(query.detach(), state)
    return Candidates(*(part.to(device) for part in candidates)), state


def keep(values: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions of ``(batch, time, ...)`` that have logits, as the models select them."""
    if isinstance(logits_to_keep, int):
        return values[:, -logits_to_keep:] if logits_to_keep else values
    if logits_to_keep.ndim == 1:
        return values[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return values[logits_to_keep]
    return torch.take_along_dim(values, logits_to_keep[..., None], dim=1)


def places(logits_to_keep: int | Tensor, time: int) -> list[int]:
    """Which positions have logits, as numbers."""
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim != 1:
        raise InputError(
            "a memory with state reads all rows at the same positions, so logits_to_keep must be "
            f"a number or a 1-D tensor, got shape {tuple(logits_to_keep.shape)}"
        )
    return keep(torch.arange(time)[None], _on_cpu(logits_to_keep))[0].tolist()


def _on_cpu(logits_to_keep: int | Tensor) -> int | Tensor:
    return logits_to_keep.cpu() if isinstance(logits_to_keep, Tensor) else logits_to_keep


def valid_positions(valid: Tensor | None, mask: Any, states: Tensor) -> Tensor | None:
    """``(batch, time)`` bool of real positions, None if all are."""
    if valid is None and isinstance(mask, Tensor) and mask.ndim == 2:
        valid = mask[:, -states.shape[1] :].bool()
    if valid is None or bool(valid.all()):
        return None
    return valid.to(states.device)
