"""One pass of a model over the windows of a corpus: scored rows only, nothing of vocabulary width.

A window has context tokens, which the model only reads, and scored tokens, whose probability is
wanted. The body of the model runs once per batch; then only the output rows before scored tokens
go on: their final hidden states to the language-model head, in chunks, and their tap states to the
memory. The (rows x vocabulary) logits of context tokens are never made.

What a memory says about the scored rows is for `memlm.evaluation.walk`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.types import TargetPartial
from memlm.data.batches import IGNORED, Batch, make_batch, plan_batches
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows, WindowTable
from memlm.models.head import Head, find_head
from memlm.models.running import check_length, device_of
from memlm.models.taps import Tap, body, capture, find_tap, reached


class Stopwatch:
    """Wall-clock seconds of named stretches; on CUDA it waits for the device at both ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Rows(NamedTuple):
    """Scored tokens, in any order.

    Attributes:
        base: ``(queries,)`` the model's own partial.
        queries: ``(queries, dim)`` tap states before the scored tokens.
        targets: ``(queries,)`` int64, the tokens that came.
        places: ``(queries,)`` int64, where each stands in the corpus.
        windows: ``(queries,)`` int64, the number of its window.
    """

    base: TargetPartial
    queries: Tensor
    targets: Tensor
    places: NDArray[np.int64]
    windows: NDArray[np.int64]

    @classmethod
    def join(cls, parts: Sequence["Rows"]) -> "Rows":
        """All rows of at least one part, in order."""
        if len(parts) == 1:
            return parts[0]
        base, queries, targets, places, windows = zip(*parts, strict=True)
        return cls(
            base=TargetPartial(*(torch.cat(values) for values in zip(*base, strict=True))),
            queries=torch.cat(queries),
            targets=torch.cat(targets),
            places=np.concatenate(places),
            windows=np.concatenate(windows),
        )

    def select(self, mask: Tensor) -> "Rows":
        """The rows where ``mask`` ``(queries,)`` is true."""
        here = mask.cpu().numpy()
        return Rows(
            base=TargetPartial(*(part[mask] for part in self.base)),
            queries=self.queries[mask],
            targets=self.targets[mask],
            places=self.places[here],
            windows=self.windows[here],
        )


class Scored(NamedTuple):
    """One batch: its scored rows, window after window, tokens in text order.

    Attributes:
        base: see `Rows`.
        queries: alike.
        targets: alike.
        places: alike.
        windows: alike.
        batch: the batch behind them, on the model's device.
        states: ``(rows, width, dim)`` tap states of all inputs.
        hidden: ``(queries, dim)`` final hidden states before the scored tokens.
    """

    base: TargetPartial
    queries: Tensor
    targets: Tensor
    places: NDArray[np.int64]
    windows: NDArray[np.int64]
    batch: Batch
    states: Tensor
    hidden: Tensor

    @property
    def rows(self) -> Rows:
        """The scored rows without the batch behind them."""
        return Rows(self.base, self.queries, self.targets, self.places, self.windows)


@dataclass(frozen=True)
class Pass:
    """A checked plan: model, corpus and windows that fit together.

    Attributes:
        model: causal language model.
        corpus: the tokens.
        table: the windows.
        batch_tokens: most padded tokens in a batch.
        head: of the model.
        tap: where queries are read.
    """

    model: PreTrainedModel
    corpus: TokenCorpus
    table: WindowTable
    batch_tokens: int
    head: Head
    tap: Tap

    def run(
        self,
        watch: Stopwatch,
        numbers: NDArray[np.int64] | None = None,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[Scored]:
        """The scored rows, batch by batch; the time goes to ``watch`` under ``"model"``.

        The caller keeps gradients off and the model in evaluation mode (`frozen`).

        Args:
            watch: for the time.
            numbers: ``(windows,)`` which windows to read; None: all.
            share: (i, n) reads the batches i, i + n, i + 2 n, ... of these windows only.
        """
        inner, device = body(self.model), device_of(self.model)
        final = find_tap(self.model, "final")
        chosen = np.arange(self.table.windows) if numbers is None else numbers
        table = WindowTable(*(column[chosen] for column in self.table))
        batches = plan_batches(table, batch_tokens=self.batch_tokens)
        for batch_of in islice(batches, share[0], None, share[1]):
            numbers = chosen[batch_of]
            made = make_batch(self.corpus, self.table, numbers)
            batch = Batch(made.input_ids.to(device), made.targets.to(device), made.windows)
            scored = batch.targets != IGNORED
            targets = batch.targets[scored]
            with watch.measure("model"), ExitStack() as hooks:
                last = hooks.enter_context(capture(self.model, final))
                tapped = hooks.enter_context(capture(self.model, self.tap))
                inner(input_ids=batch.input_ids, use_cache=False)
                hidden = _by_row(reached(last, final), batch)[scored]
                base = self.head.target(hidden, targets)
                states = _by_row(reached(tapped, self.tap), batch)
            counts, first = self.table.targets[numbers], self.table.first[numbers]
            offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield Scored(
                base=base,
                queries=states[scored],
                targets=targets,
                places=np.repeat(first, counts) + offset,
                windows=np.repeat(numbers, counts),
                batch=batch,
                states=states,
                hidden=hidden,
            )


def plan_pass(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: Windows,
    *,
    tap: str,
    batch_tokens: int,
) -> Pass:
    """Check that model, corpus and windows fit together, and plan the batches.

    Args:
        model: causal language model.
        corpus: tokens of the model's tokenizer.
        windows: the rule that cuts it.
        tap: name of the tap where a memory's queries are read.
        batch_tokens: most padded tokens in a batch.

    Raises:
        InputError: if there is nothing to score, a token is not in the vocabulary, or a window is
            longer than the model can read.
        UnsupportedModelError: if the model's head or tap cannot be reached.
    """
    table = windows.table(corpus)
    check(
        int(table.targets.sum()) > 0,
        "an evaluation must have at least one token to score, got none; give longer documents",
    )
    head = find_head(model)
    embeddings: Any = model.get_input_embeddings()
    vocabulary = min(head.vocab_size, int(embeddings.num_embeddings))
    largest = int(corpus.tokens.max())
    if largest >= vocabulary:
        name = corpus.names[int(corpus.document_of(corpus.tokens.argmax()))]
        raise InputError(
            f"every token id must be below the model's vocabulary size ({vocabulary}), got "
            f"{largest} in document {name!r}; tokenise with the model's own tokenizer"
        )
    check_length(model, int(table.inputs.max()))
    return Pass(
        model=model,
        corpus=corpus,
        table=table,
        batch_tokens=batch_tokens,
        head=head,
        tap=find_tap(model, tap),
    )


def log_probabilities(
    partial: TargetPartial, places: NDArray[np.int64], corpus: TokenCorpus
) -> NDArray[np.float64]:
    """``log p`` of the scored tokens, float64.

    Args:
        partial: ``(queries,)`` of the model and what was merged with it.
        places: ``(queries,)`` where the tokens stand in the corpus.
        corpus: the tokens.

    Raises:
        InputError: if one is not finite, naming the token, its document and what may be wrong.
    """
    values = (partial.target_lse.double() - partial.lse.double()).cpu().numpy()
    if np.isfinite(values).all():
        return values
    bad = int(np.flatnonzero(~np.isfinite(values))[0])
    place = int(places[bad])
    document = int(corpus.document_of(place))
    reason = (
        "the memory alone (lam = 1) gives probability zero to tokens that it does not propose: "
        "use lam below 1"
        if values[bad] == -np.inf
        else "look for non-finite weights, or load the model in float32"
    )
    raise InputError(
        f"every scored token must have a finite log-probability, but token "
        f"{place - int(corpus.offsets[document])} of document {corpus.names[document]!r} has "
        f"{values[bad]}; {reason}"
    )


def _by_row(states: Tensor, batch: Batch) -> Tensor:
    # Some families flatten (batch, time) before their feed-forward.
    return states.reshape(*batch.input_ids.shape, states.shape[-1])
