"""Building a datastore: the model reads the text once, every predicted token becomes an entry.

    key    = hidden state at the tap, at the position before the token
    value  = the token that really came next        (kNN-LM, Khandelwal et al. 2020, section 2)

The work is a list of ranges, planned before the first forward pass. Any number of workers, started
together or by hand on several machines that share the directory, each claim a range, compute it,
write its shard and journal it. A killed worker loses its current range only; running the same
command again continues. The forward pass stops at the tap: the head, and whatever comes after the
key, is never computed. Padding changes the low bits of hidden states, so a range's batches are
computed from its windows alone, and all else that the bytes depend on is part of the store's
identity.

Differs from the papers' code: no entry count to know beforehand, no truncated tails of zeros, the
text's documents stay apart, and a finished store is byte-identical however it was built.
"""

import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.progress import bar
from memlm.data.documents import read_documents
from memlm.data.tokens import TokenCorpus, tokenize
from memlm.data.windows import SlidingWindows, Windows, WindowTable
from memlm.extract.coding import encode, prepare_codec
from memlm.extract.config import ExtractionConfig
from memlm.extract.ranges import extract_range
from memlm.index.plan import IndexConfig
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.models.running import check_length, device_of, frozen
from memlm.models.taps import Tap, find_tap, forward_to_tap
from memlm.store.codec import Codec
from memlm.store.manifest import (
    MANIFEST,
    Identity,
    StoreInfo,
    plan_ranges,
    read_manifest,
)
from memlm.store.reader import Datastore
from memlm.store.writer import StoreWriter

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0  # between looks at what all workers have finished, for the progress bar


def build_datastore(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    out: str | Path,
    *,
    windows: Windows | None = None,
    config: ExtractionConfig | None = None,
    codes: IndexConfig | None = None,
    workers: int = 1,
    progress: bool = True,
) -> Datastore:
    """Read ``text`` with ``model`` and keep every (hidden state, next token) pair in ``out``.

    Args:
        model: a Hugging Face causal language model, on any device.
        tokenizer: its tokenizer; None if ``text`` is a ``TokenCorpus``.
        text: a file or folder, strings, documents, a ``datasets`` dataset, or a token corpus.
        out: directory of the store. An unfinished store of the same plan is continued; a finished
            one is opened as it is.
        windows: which tokens are read together; default: `SlidingWindows` of up to 512 tokens.
        config: what is kept and how.
        codes: keep codes of the keys instead of the keys (`memlm.extract.coding`): which ones.
        workers: processes that share the work; the bytes do not depend on it.
        progress: show a bar (tokens per second, remaining time) when it takes over two seconds.

    Raises:
        InputError: for text without anything to predict, windows too long for the model, or keys
            that the dtype cannot hold.
        FingerprintError: if ``out`` holds a store of another model, tokenizer, text, codec or plan.
        StoreError: if the directory cannot be written.
    """
    check(workers >= 1, f"workers must be at least 1, got {workers}")
    config = config or ExtractionConfig()
    corpus = as_corpus(text, tokenizer, progress=progress)
    windows = windows or default_windows(model)
    table = windows.table(corpus)
    check_length(model, int(table.inputs.max()))
    tap = find_tap(model, config.tap)
    out = Path(out)
    identity = identify(model, tokenizer, corpus, windows, tap, config, _threads(config, out))
    codec = None
    if codes is not None:
        codes = replace(codes, metric=config.metric)
        codec = prepare_codec(
            model, corpus, table, tap, identity, config.metric, codes, out, progress=progress
        )
        identity = replace(identity, codec=codec.fingerprint)
    info = StoreInfo(
        metric=config.metric,
        code_size=None if codec is None else codec.code_size,
        documents=corpus.documents,
        vocab_size=int(model.config.get_text_config().vocab_size),
        corpus=corpus.describe(),
    )
    writer = StoreWriter.open(
        out, identity, plan_ranges(table.targets.tolist(), config.shard_entries), info=info
    )
    helpers = _Helpers(model, corpus, windows, tap, out, 0 if writer.complete else workers - 1)
    with (
        helpers,
        bar(
            len(writer.manifest),
            label="extract",
            unit="entry",
            initial=writer.finished_rows(),
            quiet=not progress,
        ) as shown,
    ):
        while pending := writer.pending():
            if not _work(writer, pending, model, corpus, table, tap, codec, shown):
                time.sleep(_POLL_SECONDS)
        shown.update(len(writer.manifest) - shown.n)
    return writer.finalize()


def as_corpus(
    text: Any, tokenizer: PreTrainedTokenizerBase | None, *, progress: bool = True
) -> TokenCorpus:
    """``text`` as tokens: read and tokenised, unless it is a corpus already.

    Raises:
        InputError: if there is text to tokenise but no tokenizer.
    """
    if isinstance(text, TokenCorpus):
        return text
    check(tokenizer is not None, "a tokenizer is needed to read text; pass one, or a TokenCorpus")
    return tokenize(read_documents(text), tokenizer, progress=progress)


def default_windows(model: PreTrainedModel) -> SlidingWindows:
    """Sliding windows of 512 tokens, or of all the positions the model has if those are fewer."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    length = min(512, limit)
    return SlidingWindows(length=length, stride=max(1, length // 2))


def identify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: TokenCorpus,
    windows: Windows,
    tap: Tap,
    config: ExtractionConfig,
    threads: int,
) -> Identity:
    """Everything the bytes of the store depend on."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
    return Identity(
        model=str(model.config.name_or_path or type(model).__name__),
        model_hash=model_hash(model),
        tokenizer_hash=tokenizer_hash(tokenizer) if tokenizer is not None else "none",
        tap=tap.name,
        dim=key_dim(model, tap),
        dtype=dtype,
        corpus_hash=corpus.hash,
        windows=windows.to_dict(),
        batch_tokens=config.batch_tokens,
        threads=threads,
    )


def _threads(config: ExtractionConfig, out: Path) -> int:
    """The thread count asked for, else that of the build to continue, else torch's own."""
    if config.threads is None and (out / MANIFEST).exists():
        begun = read_manifest(out).identity.threads
        if begun is not None:
            return begun
    return config.threads or torch.get_num_threads()


def key_dim(model: PreTrainedModel, tap: Tap) -> int:
    """Width of the keys, read off one token."""
    with frozen(model):
        token = torch.zeros(1, 1, dtype=torch.int64, device=device_of(model))
        return forward_to_tap(model, tap, token).shape[-1]


def _work(
    writer: StoreWriter,
    numbers: list[int],
    model: PreTrainedModel,
    corpus: TokenCorpus,
    table: WindowTable,
    tap: Tap,
    codec: Codec | None,
    shown: Any = None,
) -> bool:
    """Do the ranges among ``numbers`` that nobody else holds; says whether there was one."""
    worked, looked = False, 0.0
    manifest = writer.manifest
    for number in numbers:
        with writer.claim(number) as mine:
            if mine:
                worked = True
                planned, identity = manifest.ranges[number], manifest.identity
                keys, *rest = extract_range(model, corpus, table, tap, identity, planned)
                if codec is not None:
                    metric, label = manifest.info.metric, f"keys of range {number}"
                    keys = encode(codec, keys, identity, metric, label)
                writer.write(number, keys, *rest)
        if shown is not None and time.monotonic() >= looked + _LOOK_SECONDS:
            looked = time.monotonic()
            shown.update(writer.finished_rows() - shown.n)
    return worked


class _Helpers:
    """Further processes on this machine that do the same work until nothing is left to claim.

    If one dies, the kernel frees its claim and this process does the range in the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        corpus: TokenCorpus,
        windows: Windows,
        tap: Tap,
        out: Path,
        count: int,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="memlm-model-")
        if count:
            model.save_pretrained(self._folder.name)
        arguments = (self._folder.name, str(model.device), corpus, windows, tap, out, os.getpid())
        # A forked child would inherit locked thread pools of torch and FAISS.
        context = multiprocessing.get_context("spawn")
        self._processes = [
            context.Process(target=_help, args=arguments, daemon=True) for _ in range(count)
        ]

    def __enter__(self) -> None:
        for process in self._processes:
            process.start()

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.join()
        self._folder.cleanup()


def _help(
    folder: str,
    device: str,
    corpus: TokenCorpus,
    windows: Windows,
    tap: Tap,
    out: Path,
    parent: int,
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to(device)
    writer = StoreWriter(out, read_manifest(out))
    table = windows.table(corpus)
    fingerprint = writer.manifest.identity.codec
    codec = None if fingerprint is None else Codec.read(out, fingerprint)
    for number in writer.pending():
        if os.getppid() != parent:  # the build was killed; do not go on behind the user's back
            return
        _work(writer, [number], model, corpus, table, tap, codec)
