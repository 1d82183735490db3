"""One pass of a model over the windows of a corpus: scored rows only, nothing of vocabulary width.

A window has context tokens, which the model only reads, and scored tokens, whose probability is
wanted. The body of the model runs once per batch; then only the output rows before scored tokens
go on: their final hidden states to the language-model head, in chunks, and their tap states to the
memory. The (rows x vocabulary) logits of context tokens are never made.

A memory without state answers all scored rows of a batch at once. A memory with state is walked
through time, window by window from its first token: it observes the token that really came, then
answers, also at context tokens, where its answer is dropped. So it does what the model with the
memory attached does in one forward pass over the window. Its state begins empty in every window and
ends with it, and padding is never shown to it, so the result does not depend on the batch.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.types import TargetPartial, TokenMemory
from memlm.data.batches import IGNORED, Batch, make_batch, plan_batches
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows, WindowTable
from memlm.models.head import Head, find_head
from memlm.models.running import check_length
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


class Scored(NamedTuple):
    """The scored rows of one batch, window after window, tokens in text order.

    Attributes:
        base: ``(queries,)`` the model's own partial.
        queries: ``(queries, dim)`` tap states before the scored tokens.
        targets: ``(queries,)`` int64, the tokens that came.
        places: ``(queries,)`` int64, where each stands in the corpus.
        windows: ``(queries,)`` int64, the number of its window.
        batch: the batch behind them, on the model's device.
        states: ``(rows, width, dim)`` tap states of all inputs.
    """

    base: TargetPartial
    queries: Tensor
    targets: Tensor
    places: NDArray[np.int64]
    windows: NDArray[np.int64]
    batch: Batch
    states: Tensor


@dataclass(frozen=True)
class Pass:
    """A checked plan: model, corpus and windows that fit together.

    Attributes:
        model: causal language model.
        corpus: the tokens.
        table: the windows.
        batches: window numbers per batch.
        head: of the model.
        tap: where queries are read.
    """

    model: PreTrainedModel
    corpus: TokenCorpus
    table: WindowTable
    batches: list[NDArray[np.int64]]
    head: Head
    tap: Tap

    def run(self, watch: Stopwatch) -> Iterator[Scored]:
        """The scored rows, batch by batch; the time goes to ``watch`` under ``"model"``.

        The caller keeps gradients off and the model in evaluation mode (`frozen`).
        """
        inner, device = body(self.model), self.model.device
        final = find_tap(self.model, "final")
        for numbers in self.batches:
            made = make_batch(self.corpus, self.table, numbers)
            batch = Batch(made.input_ids.to(device), made.targets.to(device), made.windows)
            scored = batch.targets != IGNORED
            targets = batch.targets[scored]
            with watch.measure("model"), ExitStack() as hooks:
                last = hooks.enter_context(capture(self.model, final))
                tapped = hooks.enter_context(capture(self.model, self.tap))
                inner(input_ids=batch.input_ids, use_cache=False)
                base = self.head.target(_by_row(reached(last, final), batch)[scored], targets)
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
    vocabulary = min(head.vocab_size, int(embeddings.weight.shape[0]))
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
        batches=plan_batches(table, batch_tokens=batch_tokens),
        head=head,
        tap=find_tap(model, tap),
    )


def memory_partial(memory: TokenMemory, scored: Scored, table: WindowTable) -> TargetPartial:
    """What a memory says about the scored tokens of a batch, ``(queries,)`` like ``scored``."""
    if memory.init_state(1) is None:
        return memory.score(scored.queries, scored.targets, None)[0]
    return _through_time(memory, scored, table)


def _through_time(memory: TokenMemory, scored: Scored, table: WindowTable) -> TargetPartial:
    (input_ids, targets, numbers), states = scored.batch, scored.states
    widths = table.inputs[numbers]
    # The longest windows come first, so that those that have ended are always the last rows.
    rows = np.argsort(-widths, kind="stable")
    chosen, state = torch.from_numpy(rows).to(targets.device), memory.init_state(len(rows))
    lse = torch.zeros(targets.shape, dtype=scored.base.lse.dtype, device=targets.device)
    target_lse = torch.zeros_like(lse)
    for step in range(int(widths.max())):
        alive = int((widths > step).sum())
        if alive < len(chosen):
            chosen = chosen[:alive]
            state = memory.select_rows(state, torch.arange(alive, device=chosen.device))
        here = slice(step, step + 1)
        state = memory.observe(input_ids[chosen, here], states[chosen, here], state)
        asked = targets[chosen, step].clamp(min=0)
        partial, state = memory.score(states[chosen, step], asked, state)
        lse[chosen, step] = partial.lse.to(lse)
        target_lse[chosen, step] = partial.target_lse.to(lse)
    mask = targets != IGNORED
    return TargetPartial(lse[mask], target_lse[mask])


def log_probabilities(
    partial: TargetPartial, scored: Scored, corpus: TokenCorpus
) -> NDArray[np.float64]:
    """``log p`` of the scored tokens, float64.

    Raises:
        InputError: if one is not finite, naming the token, its document and what may be wrong.
    """
    values = (partial.target_lse.double() - partial.lse.double()).cpu().numpy()
    if np.isfinite(values).all():
        return values
    bad = int(np.flatnonzero(~np.isfinite(values))[0])
    place = int(scored.places[bad])
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
