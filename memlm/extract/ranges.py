"""The entries of a planned range: forward passes up to the tap, and what follows each state."""

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.errors import InputError
from memlm.core.threads import torch_threads
from memlm.data.batches import IGNORED, make_batch, plan_batches
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import WindowTable
from memlm.models.running import device_of, frozen
from memlm.models.taps import Tap, forward_to_tap
from memlm.store.manifest import Identity, PlannedRange


def extract_range(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    table: WindowTable,
    tap: Tap,
    identity: Identity,
    planned: PlannedRange,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, documents and positions of one range, in text order.

    Returns:
        ``(rows, dim)`` keys in the store's dtype, and three ``(rows,)`` int32: the next token, its
        document, and its place in that document.

    Raises:
        InputError: if the store was imported and says nothing of batches.
    """
    if not identity.batch_tokens:
        raise InputError(
            "keys can only be computed as they were planned, but this store was imported and has "
            "no plan; build a store from the text instead"
        )
    span = slice(planned.first_window, planned.last_window)
    start = np.cumsum(table.targets[span]) - table.targets[span]
    keys = torch.empty(planned.rows, identity.dim, dtype=getattr(torch, identity.dtype))
    with frozen(model), torch_threads(identity.threads):
        for numbers in plan_batches(table, batch_tokens=identity.batch_tokens, span=span):
            batch = make_batch(corpus, table, numbers)
            states = forward_to_tap(model, tap, batch.input_ids.to(device_of(model)))
            scored = states[(batch.targets != IGNORED).to(states.device)].to(keys.dtype)
            rows = _ranges(start[numbers - span.start], table.targets[numbers])
            keys[torch.from_numpy(rows)] = scored.cpu()
    places = _ranges(table.first[span], table.targets[span])
    documents = corpus.document_of(places)
    return (
        keys,
        torch.from_numpy(corpus.tokens[places]),
        torch.from_numpy(documents.astype(np.int32)),
        torch.from_numpy((places - corpus.offsets[documents]).astype(np.int32)),
    )


def _ranges(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``start[i], start[i] + 1, ..., start[i] + count[i] - 1`` for every i, one after another."""
    step = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.repeat(start, count) + step
