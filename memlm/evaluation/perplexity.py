"""Perplexity of a language model with or without a memory, under a stated protocol.

For every scored token y after a context with tap state q,

    log p(y) = target_lse - lse        of   merge( head(hidden), memory(q) )

where both sides are `TargetPartial`s, so no vocabulary row is ever kept. Losses are summed per
document; everything else (perplexity, bits per byte, intervals) is computed from those sums by
`memlm.evaluation.result.Evaluation`, which also carries the protocol.

Source: kNN-LM (Khandelwal et al. 2020, eq. 3 and section 4), and the sliding-window evaluation of
the Hugging Face documentation. How a memory with state walks is in `memlm.evaluation.walk`. Differs
from the papers' code: the perplexity is token-weighted, state is never carried over from unrelated
text, and no result depends on the order or size of batches beyond floating-point rounding.

Several processes (`memlm.core.processes`) share the batches, or the groups of texts that a memory
with state walks. Every process has the whole result in the end, and it is that of one process to
the last bit: batches and groups are the same, and sums are made in the order of the text.
"""

import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.merges import Merge, Mixture
from memlm.core.processes import gather, rank_and_size
from memlm.core.progress import bar
from memlm.core.threads import torch_threads
from memlm.core.types import TokenMemory
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows
from memlm.evaluation.own import LEAVE_OUT, OwnEntries
from memlm.evaluation.passes import Pass, Rows, Stopwatch, log_probabilities, plan_pass
from memlm.evaluation.result import DocumentSums, Evaluation, Seconds, WindowSums
from memlm.evaluation.walk import (
    CARRIES,
    WALK_ROWS,
    Figures,
    carries_over_documents,
    recall,
)
from memlm.index.metrics import check_choice
from memlm.models.attach import MemoryForCausalLM
from memlm.models.fingerprint import model_hash
from memlm.models.match import check_match, stored_tap
from memlm.models.running import device_of, frozen
from memlm.ops.merge import merge_target

BATCH_TOKENS = 8192

_PACKAGES = ("memlm", "torch", "transformers", "numpy", "faiss-cpu")


def evaluate(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: Windows,
    *,
    memory: TokenMemory | None = None,
    merge: Merge | None = None,
    tap: str = "auto",
    batch_tokens: int = BATCH_TOKENS,
    interpolate: tuple[TokenMemory, Mixture] | None = None,
    carry: str = "document",
    walk_rows: int = WALK_ROWS,
    leave_out: str = "nothing",
    skip_above: float | None = None,
    threads: int | None = None,
    keep_tokens: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Score every target of the windows once.

    Args:
        model: causal language model on any one device, or one with a memory attached; read in
            evaluation mode, given back as it was.
        corpus: tokens of the model's tokenizer.
        windows: the rule that cuts the corpus into windows.
        memory: read at the tap; None evaluates the model alone.
        merge: how the memory joins the model; None: ``Mixture()``.
        tap: which hidden state is the memory's query; ``"auto"`` is the one its store was made
            with, else the model family's default.
        batch_tokens: most padded tokens per forward pass.
        interpolate: a second memory, without state, and the weight at which its distribution is
            mixed into the merged one (TRIME, eq. 7: the datastore, once more).
        carry: how far the state of a memory goes: ``"document"``, over windows as far as the text
            goes, or ``"window"``, beginning empty in each (but for what a `LongMemory` keeps).
            Without state it changes nothing.
        walk_rows: documents that a memory with state walks side by side; more is faster, and takes
            ``length * dim`` numbers for each, and ``size * dim`` for a `LongMemory`.
        leave_out: what a scored token must not find where the store was made of the very same
            text: ``"position"``, its own entry, or ``"document"``, all of its document.
        skip_above: ask a memory without state only where the model's own likeliest token has at
            most this probability: the simplest way to save searches, to compare others with.
        threads: CPU threads of torch during the evaluation; None: as they are.
        keep_tokens: keep the log-probability of every token on the result.
        progress: show a bar for work over two seconds.

    Returns:
        Sums per document and window with their protocol; natural log.

    Raises:
        InputError: if there is nothing to score, a token is not in the vocabulary, a window is
            longer than the model can read, there is a merge without a memory, or a loss is not
            finite.
        FingerprintError: if the memory's store was made by another model.
        UnsupportedModelError: if the model's head or tap cannot be reached.
    """
    if isinstance(model, MemoryForCausalLM):
        check(
            memory is None and merge is None and interpolate is None and tap == "auto",
            "a model with a memory attached brings its own memory, merge and tap, got others "
            "beside it; pass them with model.detach()",
        )
        memory, merge, tap = model.memory, model.merge, model.tap.name
        model, interpolate = model.detach(), model.interpolate
    check(
        memory is not None or merge is None,
        f"a merge needs a memory, got {merge!r} without one; pass memory=... or no merge",
    )
    check_choice("carry", carry, CARRIES)
    check_choice("leave_out", leave_out, LEAVE_OUT)
    check(
        skip_above is None
        or (0 < skip_above <= 1 and leave_out == "nothing" and _stateless(memory)),
        "skip_above must be a probability, for a memory without state that leaves out nothing, got "
        f"{skip_above}",
    )
    own = None if leave_out == "nothing" else OwnEntries(memory, corpus, leave_out)
    check(
        carry == "window" or not getattr(memory, "spans_windows", False),
        "a long-term memory joins whole windows, so carry must be 'window', got 'document'; pass "
        "carry='window'",
    )
    check(
        interpolate is None or (memory is not None and interpolate[0].init_state(1) is None),
        "interpolate needs a memory without state beside another memory; pass it as memory with "
        "merge=Mixture(lam)",
    )
    check(walk_rows >= 1, f"walk_rows must be at least 1 document, got {walk_rows}")
    merge = Mixture() if merge is None and memory is not None else merge
    watch = Stopwatch(device_of(model))
    with frozen(model), torch_threads(threads), watch.measure("total"):
        plan = plan_pass(
            model,
            corpus,
            windows,
            tap=choose_tap(tap, memory),
            batch_tokens=batch_tokens,
        )
        if memory is not None:
            check_match(model, memory, plan.tap)
        if interpolate is not None:
            check_match(model, interpolate[0], plan.tap)
        sums, figures = _Sums(plan), Figures()
        share = rank_and_size()
        with bar(
            int(plan.table.targets.sum()) // share[1],
            label="evaluate",
            unit="token",
            quiet=not progress or share[0] > 0,
        ) as shown:
            for rows, recalled in recall(
                plan,
                memory,
                watch,
                figures,
                carry=carry,
                walk_rows=walk_rows,
                own=own,
                skip_above=skip_above,
                share=share,
            ):
                partial = rows.base
                if recalled is not None and merge is not None:
                    with watch.measure("memory"):
                        partial = merge_target(merge, rows.base, recalled)
                        sums.empty += int(torch.isneginf(recalled.lse).sum())
                        if interpolate is not None:
                            second, weight = interpolate
                            again = second.score(rows.queries, rows.targets, None)[0]
                            partial = merge_target(weight, partial, again)
                sums.add(rows, log_probabilities(partial, rows.places, corpus))
                shown.update(len(rows.places))
        sums.join()
        figures.join()
        nll, tokens, window_nll = sums.totals()
        documents = document_sums(corpus, nll, tokens)
        protocol = protocol_of(plan, windows, documents, memory, merge, carry)
    if share[1] > 1:
        protocol["processes"] = share[1]
    if memory is not None:
        protocol["without_candidates"] = sums.empty
        protocol["left_out_of_memory"] = leave_out
        protocol["skip_above"] = skip_above
    if interpolate is not None:
        protocol["interpolated"] = {
            "memory": interpolate[0].describe(),
            "merge": interpolate[1].to_dict(),
        }
    return Evaluation(
        protocol=protocol,
        documents=documents,
        windows=WindowSums(tuple(window_nll.tolist()), tuple(plan.table.targets.tolist())),
        seconds=Seconds(
            *(max(gather(watch.seconds.get(part, 0.0))) for part in ("model", "memory", "total"))
        ),
        model=model_identity(plan),
        corpus=corpus.describe(),
        versions=versions(),
        memory_stats=figures.summary(),
        token_log_probabilities=sums.log_probabilities if keep_tokens else None,
    )


class _Sums:
    """The log-probability of every scored token, in the order of windows, and its sums."""

    def __init__(self, plan: Pass):
        self.corpus, self.table = plan.corpus, plan.table
        self.start = np.cumsum(plan.table.targets) - plan.table.targets
        self.log_probabilities = np.full(int(plan.table.targets.sum()), np.nan)
        self.empty = 0

    def add(self, rows: Rows, log_probability: np.ndarray) -> None:
        place = self.start[rows.windows] + rows.places - self.table.first[rows.windows]
        self.log_probabilities[place] = log_probability

    def join(self) -> None:
        """Take over what other processes computed."""
        self.empty = sum(gather(self.empty))
        for part in gather(self.log_probabilities):
            missing = np.isnan(self.log_probabilities)
            self.log_probabilities[missing] = part[missing]

    def totals(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums in the order of the text.

        Returns:
            ``(documents,)`` negative log-likelihood in nats and scored tokens, and ``(windows,)``
            negative log-likelihood.
        """
        window = np.repeat(np.arange(self.table.windows), self.table.targets)
        place = self.table.first[window] + np.arange(len(window)) - self.start[window]
        document, documents = self.corpus.document_of(place), self.corpus.documents
        nll = -self.log_probabilities
        return (
            np.bincount(document, nll, minlength=documents),
            np.bincount(document, minlength=documents),
            np.bincount(window, nll, minlength=self.table.windows),
        )


def document_sums(corpus: TokenCorpus, nll: np.ndarray, tokens: np.ndarray) -> DocumentSums:
    """Sums per document beside what the corpus knows of its text.

    Args:
        corpus: the tokens.
        nll: ``(documents,)`` summed negative log-likelihood, nats.
        tokens: ``(documents,)`` scored tokens.
    """
    lengths = np.diff(corpus.offsets)
    begins = 0 if corpus.begin_token is None else np.minimum(lengths, 1)
    return DocumentSums(
        names=corpus.names,
        nll=tuple(nll.tolist()),
        tokens=tuple(tokens.tolist()),
        unscored=tuple((lengths - begins - tokens).tolist()),
        bytes=_sizes(corpus.text_bytes),
        words=_sizes(corpus.text_words),
        characters=_sizes(corpus.text_characters),
    )


def protocol_of(
    plan: Pass,
    windows: Windows,
    documents: DocumentSums,
    memory: TokenMemory | None,
    merge: Merge | None,
    carry: str = "document",
) -> dict[str, Any]:
    """The protocol as plain JSON values, see `memlm.evaluation.protocol`.

    Args:
        plan: the pass that was made.
        windows: its rule.
        documents: what was scored.
        memory: the memory or None.
        merge: the merge or None.
        carry: how far its state goes, if it has one.
    """
    corpus, table = plan.corpus, plan.table
    lengths = np.diff(corpus.offsets)
    begins = 0 if corpus.begin_token is None else int((lengths > 0).sum())
    stateless = memory is None or _stateless(memory)
    return {
        "windows": windows.to_dict(),
        "windows_line": windows.describe(),
        "window_count": table.windows,
        "longest_input": int(table.inputs.max()),
        "scored": {
            "tokens": sum(documents.tokens),
            "documents": sum(count > 0 for count in documents.tokens),
            "begin_tokens": begins,
            "left_out": sum(documents.unscored),
        },
        "begin_token": corpus.begin_token,
        "unit": "token of the model's tokenizer; bytes are UTF-8, words are separated by spaces",
        "log_base": "e (nats); bits are base 2",
        "weighting": "every scored token counts the same",
        "batch_tokens": plan.batch_tokens,
        "padding": "right, never scored, no attention mask",
        "threads": torch.get_num_threads(),
        "memory": None if memory is None else memory.describe(),
        "merge": None if merge is None else merge.to_dict(),
        "carry": None if stateless else carry,
        "state": None if stateless else _state_words(plan, memory, carry),
    }


def _stateless(memory: TokenMemory | None) -> bool:
    return memory is not None and memory.init_state(1) is None


def _state_words(plan: Pass, memory: TokenMemory | None, carry: str) -> str:
    across = carries_over_documents(plan.table, plan.corpus)
    reach = f"carried over windows, through {'the text' if across else 'each document'}"
    if getattr(memory, "spans_windows", False):
        return f"long-term memory {reach}; local memory begins empty in each window"
    return "state begins empty in each window" if carry == "window" else f"state {reach}"


def choose_tap(tap: str, memory: TokenMemory | None) -> str:
    """The tap's name: what was asked for, or where the memory's store says its keys were read."""
    return (stored_tap(memory) if tap == "auto" and memory is not None else None) or tap


def model_identity(plan: Pass) -> dict[str, Any]:
    """Name, hash, dtype, device and tap of the model, as plain JSON values."""
    model = plan.model
    return {
        "name": str(model.config.name_or_path) or type(model).__name__,
        "hash": model_hash(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_of(model).type,
        "tap": plan.tap.to_dict(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sizes(values: np.ndarray | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values.tolist())
