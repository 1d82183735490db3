"""A datastore of translations: every token that a decoder has to write becomes an entry.

    key    = hidden state of the decoder at the tap, before the token, with the true target so far
    value  = the token                             (kNN-MT, Khandelwal et al. 2021, section 2)

The work is planned and resumed as in `memlm.extract.build`: ranges of pairs, each claimed, computed
and journaled. Entries come in the order of pairs; the end token of every target is stored.
"""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.progress import bar
from memlm.core.threads import torch_threads
from memlm.data.batches import IGNORED
from memlm.data.pairs import PairBatch, PairCorpus
from memlm.extract.config import ExtractionConfig
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.models.pairs import decoder_inputs, encode
from memlm.models.running import frozen
from memlm.models.taps import Tap, find_tap, forward_to_tap
from memlm.store.manifest import Identity, StoreInfo, plan_ranges
from memlm.store.reader import Datastore
from memlm.store.writer import StoreWriter

_POLL_SECONDS = 0.2


def build_pair_datastore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: PairCorpus,
    out: str | Path,
    *,
    config: ExtractionConfig | None = None,
    progress: bool = True,
) -> Datastore:
    """Read every pair with ``model`` and keep all (decoder state, next token) pairs in ``out``.

    Args:
        model: an encoder-decoder of Hugging Face, on any device.
        tokenizer: its tokenizer, for the store's identity; None if the tokens came from elsewhere.
        pairs: tokens of the model's tokenizer.
        out: directory of the store. An unfinished store of the same plan is continued; a finished
            one is opened as it is.
        config: what is kept and how.
        progress: show a bar.

    Raises:
        UnsupportedModelError: if the model is no encoder-decoder, or its tap is not known.
        InputError: if a token is not in the vocabulary.
        FingerprintError: if ``out`` holds a store of another model, tokenizer, text or plan.
    """
    config = config or ExtractionConfig()
    tap = find_tap(model, config.tap)
    vocabulary = int(model.config.get_text_config().vocab_size)
    largest = int(max(pairs.sources.tokens.max(), pairs.targets.tokens.max()))
    check(
        largest < vocabulary,
        f"every token id must be below the model's vocabulary size ({vocabulary}), got {largest}; "
        "tokenise with the model's own tokenizer",
    )
    threads = config.threads or torch.get_num_threads()
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
    identity = Identity(
        model=str(model.config.name_or_path or type(model).__name__),
        model_hash=model_hash(model),
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "none",
        tap=tap.name,
        dim=_states(model, tap, pairs.batch([0])).shape[-1],
        dtype=dtype,
        corpus_hash=pairs.hash,
        windows={"kind": "Pairs"},
        batch_tokens=config.batch_tokens,
        threads=threads,
    )
    info = StoreInfo(
        metric=config.metric,
        documents=len(pairs),
        vocab_size=vocabulary,
        corpus={"sources": pairs.sources.describe(), "targets": pairs.targets.describe()},
    )
    counts = np.diff(pairs.targets.offsets).tolist()
    ranges = plan_ranges(counts, config.shard_entries)
    writer = StoreWriter.open(Path(out), identity, ranges, info=info)
    total, done = len(writer.manifest), writer.finished_rows()
    with bar(total, label="extract", unit="entry", initial=done, quiet=not progress) as shown:
        while pending := writer.pending():
            worked = False
            for number in pending:
                with writer.claim(number) as mine:
                    if mine:
                        worked = True
                        span = slice(ranges[number].first_window, ranges[number].last_window)
                        writer.write(number, *_entries(model, pairs, tap, identity, span))
                        shown.update(writer.finished_rows() - shown.n)
            if not worked:
                time.sleep(_POLL_SECONDS)
    return writer.finalize()


def _entries(
    model: PreTrainedModel, pairs: PairCorpus, tap: Tap, identity: Identity, span: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, pair numbers and places in the targets of some pairs, in order."""
    offsets = pairs.targets.offsets[span.start : span.stop + 1]
    first, counts = int(offsets[0]), np.diff(offsets)
    keys = torch.empty(int(counts.sum()), identity.dim, dtype=getattr(torch, identity.dtype))
    with torch_threads(identity.threads):
        for batch, numbers in pairs.batches(identity.batch_tokens, span):
            states = _states(model, tap, batch)
            for row, number in enumerate(numbers.tolist()):
                begin, end = offsets[number - span.start : number - span.start + 2] - first
                keys[begin:end] = states[row, : end - begin].to(keys.dtype).cpu()
    places = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return (
        keys,
        torch.from_numpy(pairs.targets.tokens[first : first + len(keys)]),
        torch.from_numpy(np.repeat(np.arange(span.start, span.stop), counts).astype(np.int32)),
        torch.from_numpy(places.astype(np.int32)),
    )


def _states(model: PreTrainedModel, tap: Tap, batch: PairBatch) -> Tensor:
    """``(rows, target, dim)`` tap states at the labels; what stands at padding is no state."""
    with frozen(model):
        seen = encode(model, batch)
        labels = batch.labels.masked_fill(batch.labels == IGNORED, 0)
        inputs = decoder_inputs(model, labels)
        return forward_to_tap(model, tap, inputs, **seen)
