"""The language-model head on its own: hidden states in, logits or known-target scores out.

Scoring a known text needs two numbers per position, not a vocabulary row:

    lse = logsumexp_v l_v        target_lse = l_y        log p(y) = target_lse - lse

so the head is run over chunks of rows and each chunk's logits are dropped at once; ``queries x
vocabulary`` is never held. What some families do to the logits after the projection is part of the
head: soft-capping ``cap * tanh(l / cap)`` (Gemma 2), a factor (Cohere ``logit_scale``, Falcon-H1
``lm_head_multiplier``), a divisor (Granite ``logits_scaling``).

An adaptive softmax answers for itself (`memlm.models.adaptive.head`): its lse is that of frequent
words and classes, its target_lse the class's score plus the log-probability inside the class. These
are log-scores on the scale of the head's own partition, so `union` with a memory is exact.

A head is accepted only after a probe: one short forward pass whose logits it must reproduce. So a
family that does something else is refused instead of being scored wrongly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memlm.core.errors import InputError, UnsupportedModelError
from memlm.core.types import TargetPartial
from memlm.models.adaptive.head import AdaptiveHead
from memlm.models.running import device_of
from memlm.models.taps import capture, find_tap, reached

_CHUNK_ENTRIES = 1 << 23  # logits held at once: 32 MiB in float32
_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Head:
    """The head of one model; shares the model's weights.

    Attributes:
        projection: the model's output embeddings, ``dim -> vocabulary``.
        cap: soft-cap of the logits, None for none.
        scale: factor on the logits.
        divisor: divisor of the logits.
    """

    projection: nn.Module
    cap: float | None = None
    scale: float = 1.0
    divisor: float = 1.0

    @property
    def vocab_size(self) -> int:
        """How many tokens have a logit."""
        if isinstance(self.projection, AdaptiveHead):
            return self.projection.vocab_size
        return int(self.projection.weight.shape[0])  # type: ignore[union-attr]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own logits.

        Args:
            hidden: ``(..., dim)`` final hidden states (tap ``"final"``).

        Returns:
            ``(..., vocabulary)`` in the model's dtype.
        """
        # the same operations in the same order as the models', so that the bits agree
        logits = self.projection(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def target(self, hidden: Tensor, targets: Tensor, chunk: int | None = None) -> TargetPartial:
        """The head's word on known next tokens.

        Args:
            hidden: ``(queries, dim)`` final hidden states.
            targets: ``(queries,)`` int64 true next tokens.
            chunk: rows whose logits are held at once; None picks about 32 MiB worth.

        Returns:
            ``(queries,)`` pairs in float32 (float64 for a float64 model), natural log.

        Raises:
            InputError: if a target is no token of the vocabulary.
        """
        if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
            raise InputError(
                "hidden must be (queries, dim) and targets (queries,), got "
                f"{tuple(hidden.shape)} and {tuple(targets.shape)}"
            )
        vocab = self.vocab_size
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
            raise InputError(
                f"targets must be tokens of the model's vocabulary (0 to {vocab - 1}), got "
                f"{int(targets.min())} to {int(targets.max())}; was the text made with another "
                "tokenizer?"
            )
        if isinstance(self.projection, AdaptiveHead):
            return self.projection.target(hidden, targets, chunk)
        rows = chunk or max(1, _CHUNK_ENTRIES // vocab)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        lse, own = [], []
        for part, wanted in _chunks(hidden, targets, rows):
            logits = self.logits(part).to(wide)
            lse.append(torch.logsumexp(logits, dim=-1))
            own.append(logits.gather(-1, wanted[:, None]).squeeze(-1))
        if not lse:
            empty = hidden.new_zeros(0, dtype=wide)
            return TargetPartial(empty, empty)
        return TargetPartial(torch.cat(lse), torch.cat(own))

    def confidence(self, hidden: Tensor, chunk: int | None = None) -> Tensor:
        """The log-probability of the likeliest token.

        Args:
            hidden: ``(queries, dim)`` final hidden states.
            chunk: rows whose logits are held at once; None picks about 32 MiB worth.

        Returns:
            ``(queries,)`` natural log, in float32 or wider.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        parts = [hidden.new_empty(0, dtype=wide)]
        for part in hidden.split(chunk or max(1, _CHUNK_ENTRIES // self.vocab_size)):
            logits = self.logits(part).to(wide)
            parts.append(logits.amax(-1) - torch.logsumexp(logits, dim=-1))
        return torch.cat(parts)


def find_head(model: PreTrainedModel) -> Head:
    """The head of a causal language model, proven by a probe forward pass.

    Raises:
        UnsupportedModelError: if the model has no output embeddings, or its logits are made in a
            way this class does not reproduce.
    """
    projection = model.get_output_embeddings()
    if projection is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} must have a language-model head but has none; load the model "
            "with AutoModelForCausalLM"
        )
    config: Any = model.config.get_text_config()
    head = Head(
        projection=projection,
        cap=_setting(config, "final_logit_softcapping", None),
        scale=_setting(config, "logit_scale", 1.0) * _setting(config, "lm_head_multiplier", 1.0),
        divisor=_setting(config, "logits_scaling", 1.0),
    )
    _probe(model, head)
    return head


@torch.no_grad()
def _probe(model: PreTrainedModel, head: Head) -> None:
    tokens = torch.arange(_PROBE_TOKENS, device=device_of(model))[None] % head.vocab_size
    everything = torch.ones_like(tokens)
    tap = find_tap(model, "final")
    with capture(model, tap) as seen:
        expected = model(input_ids=tokens, attention_mask=everything, use_cache=False).logits
    got = head.logits(reached(seen, tap))
    # equal operations give equal bits; a device may still pick another kernel for another shape
    bound = 32 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    if got.shape != expected.shape or not float((got - expected).abs().max()) <= bound:
        raise UnsupportedModelError(
            f"the logits of {type(model).__name__} must be its output embeddings applied to its "
            "final hidden states (with a soft-cap or factor), but a probe differed; this model "
            "cannot be scored without its own forward pass"
        )


def _chunks(hidden: Tensor, targets: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(hidden), rows):
        yield hidden[start : start + rows], targets[start : start + rows]


def _setting(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value
