"""A causal language model bound to its objective: a batch in, a sum of losses out.

    loss = - sum over targets y of [ logaddexp(own_y, t) - logaddexp(lse, m) ]

where (lse, own_y) is the model's own partial and (m, t) the training memory's (TRIME, Zhong et al.
2022, eq. 4). Without memory it is cross-entropy. The body runs once, the head over chunks of rows,
and neither ``rows x vocabulary`` nor ``queries x keys`` is held.

Differs from the paper's code: any head that scores a known target takes part, not only an adaptive
softmax; sums are float32 or wider under autocast too.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import UnsupportedModelError
from memlm.core.types import TargetPartial
from memlm.data.batches import IGNORED
from memlm.models.head import Head, find_head
from memlm.models.running import frozen
from memlm.models.taps import body, capture, find_tap, reached
from memlm.ops.merge import union
from memlm.training.loss import head_memory_loss
from memlm.training.objectives.config import Objective
from memlm.training.objectives.gather import rank_and_size
from memlm.training.objectives.memory import (
    Positions,
    external_memory,
    local_memory,
    long_memory,
)

_ROWS = 1024  # targets whose logits are held at once by a head without a loss of its own


class ObjectiveOutput(NamedTuple):
    """What a batch contributes to a step.

    Attributes:
        loss_sum: scalar, nats, with gradient.
        count: scalar int64, targets of this process.
        figures: sums in nats without gradient; ``"model"``: loss of the model without memory.
    """

    loss_sum: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    figures: dict[str, Tensor]


class ObjectiveModule(nn.Module):
    """A model and what it is trained for.

    Args:
        model: a causal language model, used as it is.
        objective: what is lowered.

    Raises:
        UnsupportedModelError: if the model's head or tap cannot be reached.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective
        with frozen(model):
            self._head = find_head(model)
        self._final = find_tap(model, "final")
        self._tap = find_tap(model, objective.tap)

    def forward(
        self, batch: Mapping[str, Tensor], *, step: int = 0, micro: int = 0
    ) -> ObjectiveOutput:
        """Losses of a batch; see `memlm.training.objectives` for what it holds.

        Args:
            batch: ``input_ids``, ``shift_labels`` and, if wanted, ``stream``, ``position``,
                ``document``; each ``(rows, time)`` int64.
            step: finished optimiser steps.
            micro: number of the micro-batch in its step.

        Raises:
            InputError: if the batch has no such columns or shapes, or the processes do not make
                whole streams.
            UnsupportedModelError: if the keys carry no gradient though the model does.
        """
        _check_batch(batch)
        targets = batch["shift_labels"]
        hidden, keys = self._states(batch["input_ids"])
        warm = self.training and step < self.objective.warmup_steps
        memory = None
        if self.objective.method != "ce" and not warm:
            memory = self._memory(Positions(keys, targets), batch, step, micro)
            memory = TargetPartial(*(part.flatten() for part in memory))
        loss, alone = head_loss(self._head, hidden.flatten(0, 1), targets.flatten(), memory)
        return ObjectiveOutput(loss, (targets != IGNORED).sum(), {"model": alone})

    def _states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Final and tap states, ``(rows, time, dim)`` each."""
        with ExitStack() as hooks:
            final = hooks.enter_context(capture(self.model, self._final))
            tapped = hooks.enter_context(capture(self.model, self._tap))
            body(self.model)(input_ids=input_ids, use_cache=False)
        hidden, keys = reached(final, self._final), reached(tapped, self._tap)
        if hidden.requires_grad and not keys.requires_grad:
            raise UnsupportedModelError(
                "the keys of a training memory must carry gradients, but gradient checkpointing "
                "hides them; enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return hidden, keys

    def _memory(
        self, positions: Positions, batch: Mapping[str, Tensor], step: int, micro: int
    ) -> TargetPartial:
        rule = self.objective
        if rule.method == "trime":
            return local_memory(
                positions, document=batch.get("document"), temperature=rule.temperature
            )
        shared: dict[str, Any] = {
            "detach_remote": rule.detach_remote,
            "temperature": rule.temperature,
        }
        if rule.method == "trime_ext":
            hide = self.training and _draw(rule.seed, step, micro) < rule.drop_own
            return external_memory(positions, hide_own=hide, **shared)
        size = rank_and_size()[1]
        check(
            size % rule.ranks_per_stream == 0,
            "the number of processes must be a multiple of ranks_per_stream, got "
            f"{size} processes and ranks_per_stream={rule.ranks_per_stream}",
        )
        return long_memory(
            positions,
            stream=batch.get("stream"),
            position=batch.get("position"),
            ranks_per_stream=rule.ranks_per_stream,
            **shared,
        )


def head_loss(
    head: Head, hidden: Tensor, targets: Tensor, memory: TargetPartial | None
) -> tuple[Tensor, Tensor]:
    """Summed loss of the targets under one softmax over a model's head and a memory.

    Args:
        head: of the model.
        hidden: ``(n, dim)`` final states.
        targets: ``(n,)`` int64; -100 marks rows that do not count.
        memory: ``(n,)`` what the memory says, with gradient; None: cross-entropy.

    Returns:
        The loss, and the loss of the head alone (without gradient), in nats.
    """
    if _is_plain(head):
        return head_memory_loss(hidden, head.projection.weight, targets, memory)  # type: ignore[arg-type]
    counted = targets != IGNORED
    hidden, targets = hidden[counted], targets[counted]
    if memory is not None:
        memory = TargetPartial(*(part[counted] for part in memory))
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    alone = total.clone()
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        # the logits are made again in the backward pass instead of being kept
        base = TargetPartial(
            *checkpoint(head.target, hidden[rows], targets[rows], use_reentrant=False)
        )
        alone = alone + (base.lse - base.target_lse).detach().sum()
        merged = base if memory is None else union(base, *_rows(memory, rows))
        total = total + (merged.lse - merged.target_lse).sum()
    return total, alone


def _rows(memory: TargetPartial, rows: slice) -> list[TargetPartial]:
    return [TargetPartial(*(part[rows] for part in memory))]


def _is_plain(head: Head) -> bool:
    return (
        isinstance(head, Head)
        and isinstance(head.projection, nn.Linear)
        and head.projection.bias is None
        and (head.cap, head.scale, head.divisor) == (None, 1.0, 1.0)
    )


def _draw(seed: int, step: int, micro: int) -> float:
    """A number in [0, 1) that every process draws alike, also after a restart."""
    return float(np.random.default_rng([seed, step, micro]).random())


def _check_batch(batch: Mapping[str, Tensor]) -> None:
    missing = [name for name in ("input_ids", "shift_labels") if name not in batch]
    check(not missing, f"a batch must have input_ids and shift_labels, {missing} are missing")
    shape = batch["input_ids"].shape
    for name in ("shift_labels", "stream", "position", "document"):
        if (column := batch.get(name)) is not None:
            check(
                column.ndim == 2 and column.shape == shape,
                f"{name} must be (rows, time) like input_ids {tuple(shape)}, got "
                f"{tuple(column.shape)}",
            )
