"""What a learnt gate learns from, and what it gains: features of every scored token, once.

For every token y after a query q the model says log p(y), the memory log p_memory(y), and what is
known before the memory is asked becomes features:

    ctxt      the query                                                (queries, dim)
    lm_ent    entropy of the model's next-token distribution, nats     (queries, 1)
    lm_max    its largest probability                                  (queries, 1)
    freq      log(1 + count) of the last 1 ... n tokens in a text      (queries, n)
    fert      log(1 + different tokens that followed them there)       (queries, n)

The last two need counts of the text that the store was made of (`count_contexts`).

Source: AdaptRet (He, Neubig and Berg-Kirkpatrick 2021, section 4.2). Differs from its code: the
threshold of a cutoff may come from other text, and the memory is asked only where it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.types import TokenMemory
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import Windows
from memlm.evaluation.passes import Stopwatch, plan_pass
from memlm.models.match import check_match, stored_tap
from memlm.models.retrieval_gate import RetrievalGate
from memlm.models.running import device_of, frozen
from memlm.ops.logsumexp import safe_logaddexp

_CHUNK_ENTRIES = 1 << 23  # logits held at once: 32 MiB in float32


@dataclass(frozen=True)
class GateData:
    """Scored tokens in the order of the text.

    Attributes:
        features: ``(tokens, columns)`` float32 by name.
        model: ``(tokens,)`` log-probability of the token that came.
        memory: alike, -inf where the memory does not propose it.
    """

    features: Mapping[str, Tensor]
    model: Tensor
    memory: Tensor

    def __len__(self) -> int:
        """Tokens."""
        return len(self.model)

    def select(self, rows: Any) -> "GateData":
        """Some of the tokens, by a slice, mask or numbers."""
        features = {name: part[rows] for name, part in self.features.items()}
        return GateData(features, self.model[rows], self.memory[rows])

    def nll(self, log_weights: Tensor, threshold: float | None = None) -> Tensor:
        """Negative log-likelihoods of the gated mixture.

        Args:
            log_weights: ``(tokens, 2)`` of a gate.
            threshold: the memory is not asked where the model's log-weight reaches it; None:
                it always is.

        Returns:
            ``(tokens,)`` nats.
        """
        log_model, log_memory = log_weights.unbind(-1)
        mixed = -safe_logaddexp(log_model + self.model, log_memory + self.memory)
        return (
            mixed if threshold is None else torch.where(log_model >= threshold, -self.model, mixed)
        )


class GateFigures(NamedTuple):
    """What a gate reaches on a text.

    Attributes:
        perplexity: of the gated mixture, per token.
        saved: share of tokens for which the memory was not asked.
    """

    perplexity: float
    saved: float


@torch.no_grad()
def measure_gate(
    gate: RetrievalGate, data: GateData, threshold: float | None = None
) -> GateFigures:
    """Perplexity of a gate on a text, with or without leaving out searches.

    Args:
        gate: learnt on other text.
        data: of this text.
        threshold: from `memlm.models.retrieval_gate.threshold_at`; None: search at every token.
    """
    log_weights = gate(data.features)
    perplexity = float(data.nll(log_weights, threshold).double().mean().exp())
    saved = 0.0 if threshold is None else float((log_weights[:, 0] >= threshold).double().mean())
    return GateFigures(perplexity, saved)


@dataclass(frozen=True)
class ContextCounts:
    """Counts of short contexts in a text.

    Attributes:
        count: how often each context came, by its tokens.
        successors: how many different tokens followed it.
        orders: longest context.
    """

    count: Mapping[tuple[int, ...], int]
    successors: Mapping[tuple[int, ...], int]
    orders: int


def count_contexts(corpus: TokenCorpus, orders: int = 4) -> ContextCounts:
    """Count contexts of 1 to ``orders`` tokens, inside documents.

    Args:
        corpus: the text that the store was made of.
        orders: longest context.
    """
    check(orders >= 1, f"contexts must have at least 1 token, got {orders}")
    count: dict[tuple[int, ...], int] = {}
    followed: dict[tuple[int, ...], set[int]] = {}
    for begin, end in pairwise(corpus.offsets.tolist()):
        row = corpus.tokens[begin:end].tolist()
        for place in range(1, len(row)):
            for order in range(1, min(orders, place) + 1):
                context = tuple(row[place - order : place])
                count[context] = count.get(context, 0) + 1
                followed.setdefault(context, set()).add(row[place])
    return ContextCounts(count, {name: len(kept) for name, kept in followed.items()}, orders)


def gather_gate_data(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: Windows,
    memory: TokenMemory,
    *,
    counts: ContextCounts | None = None,
    batch_tokens: int = 8192,
) -> GateData:
    """Read a text once with model and memory.

    Args:
        model: causal language model.
        corpus: tokens of the text.
        windows: the rule that cuts it.
        memory: without state.
        counts: of the store's text; None: no ``freq`` and ``fert``.
        batch_tokens: most padded tokens per forward pass.

    Raises:
        InputError: for a memory with state, or a text without tokens to score.
        FingerprintError: if the memory's store was made by another model.
    """
    check(memory.init_state(1) is None, "a gate is for a memory without state; use a KnnMemory")
    with frozen(model):
        plan = plan_pass(
            model, corpus, windows, tap=stored_tap(memory) or "auto", batch_tokens=batch_tokens
        )
        check_match(model, memory, plan.tap)
        parts: dict[str, list[Tensor]] = {}
        for scored in plan.run(Stopwatch(device_of(model))):
            found = memory.score(scored.queries, scored.targets, None)[0]
            entropy, largest = _sureness(plan.head, scored.hidden)
            row = {
                "place": torch.from_numpy(scored.places),
                "model": scored.base.target_lse - scored.base.lse,
                "memory": found.target_lse - found.lse.nan_to_num(neginf=0.0),
                "ctxt": scored.queries,
                "lm_ent": entropy[:, None],
                "lm_max": largest[:, None],
            }
            for name, part in row.items():
                parts.setdefault(name, []).append(part.cpu())
    joined = {name: torch.cat(rows) for name, rows in parts.items()}
    order = joined.pop("place").argsort()
    joined = {name: part[order].float().clone() for name, part in joined.items()}
    model_part, memory_part = joined.pop("model"), joined.pop("memory")
    if counts is not None:
        places = torch.cat(parts["place"])[order].numpy()
        joined |= _context_features(corpus, places, counts)
    return GateData(joined, model_part, memory_part)


def _sureness(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and largest probability of the next token, ``(queries,)`` each."""
    entropy, largest = [], []
    for part in hidden.split(max(1, _CHUNK_ENTRIES // head.vocab_size)):
        rows = head.logits(part).float().log_softmax(-1)
        entropy.append(-(rows.exp() * rows).sum(-1))
        largest.append(rows.amax(-1).exp())
    return torch.cat(entropy), torch.cat(largest)


def _context_features(
    corpus: TokenCorpus, places: np.ndarray, counts: ContextCounts
) -> dict[str, Tensor]:
    """``(tokens, orders)`` of the contexts before the tokens at some places."""
    starts = corpus.offsets[corpus.document_of(places)]
    freq = np.zeros((len(places), counts.orders), np.float32)
    fert = np.zeros_like(freq)
    for row, (place, start) in enumerate(zip(places.tolist(), starts.tolist(), strict=True)):
        for order in range(1, min(counts.orders, place - start) + 1):
            context = tuple(corpus.tokens[place - order : place].tolist())
            freq[row, order - 1] = counts.count.get(context, 0)
            fert[row, order - 1] = counts.successors.get(context, 0)
    return {"freq": torch.from_numpy(np.log1p(freq)), "fert": torch.from_numpy(np.log1p(fert))}
