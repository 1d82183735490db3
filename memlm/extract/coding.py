"""A store of codes: the codec is trained on a sample of the text, then every key is coded at once.

    sample     pieces of the text, drawn with a seed until there are enough keys; then forgotten
    codec      an index trained on them: IVF-PQ, or of rotated keys (OPQ)
    build      as every build, but each range's keys become codes before anything is written

No whole key is ever on disk. The codec is made by the first worker; others wait for it. A run that
dies before it is finished reads the sample again; after that nothing of it is repeated.

Differs from an index of a store of whole keys in the sample alone: pieces of consecutive text are
read, since a sample of single positions would need a forward pass over all of it. Where the sample
is the whole text the two are the same index.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.core.faiss_files import write_faiss
from memlm.core.files import checksum, fingerprint, write_json
from memlm.core.progress import bar
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import WindowTable
from memlm.extract.ranges import extract_range
from memlm.index.build import train_faiss
from memlm.index.metrics import prepare_keys
from memlm.index.plan import IndexConfig, IndexPlan, plan_index
from memlm.index.record import IndexRecord
from memlm.models.taps import Tap
from memlm.store.codec import CODEC, CODEC_RECORD, Codec
from memlm.store.directory import make_directory, waiting
from memlm.store.entries import stored_keys
from memlm.store.manifest import Identity, plan_ranges

_PLACES = 12  # bytes per entry beside its code: token, document, position


def plan_codes(entries: int, dim: int, config: IndexConfig) -> IndexPlan:
    """The codec that would be trained, and the bytes of the store on disk.

    Args:
        entries: of the store.
        dim: width of a key.
        config: what codes are wanted; of type "ivfpq", "opq" or "fastscan", or a factory string.

    Raises:
        InputError: if there are too few keys to train codes, or the type makes none.
    """
    plan = plan_index(entries, dim, config)
    check(
        plan.engine == "faiss" and plan.factory != "Flat" and "HNSW" not in plan.factory,
        f"a store of codes needs an index that makes codes, got {plan.factory or 'exact search'} "
        f"for {entries:,} keys; take ivfpq or opq and more text, or keep whole keys",
    )
    size = _code_size(dim, plan.factory)
    stored = entries * (size + _PLACES)
    whole = entries * (2 * dim + _PLACES)
    text = (
        f"store of codes, {plan.factory}: {entries:,} entries of {size} + {_PLACES} bytes, "
        f"{stored / 1e6:,.1f} MB ({whole / 1e6:,.1f} MB with whole keys), codec trained on "
        f"{min(plan.train_size, entries):,} keys, {plan.bytes / 1e6:,.1f} MB in memory to search"
    )
    return replace(plan, text=text, bytes=stored)


def prepare_codec(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    table: WindowTable,
    tap: Tap,
    identity: Identity,
    metric: str,
    config: IndexConfig,
    out: Path,
    *,
    progress: bool = True,
) -> Codec:
    """The codec of the store in ``out``: the one that is there, else trained now.

    Args:
        model: that makes the keys.
        corpus: the text.
        table: its windows.
        tap: where keys are read.
        identity: of the store, without a codec.
        metric: how keys are compared.
        config: what codes are wanted.
        out: directory of the store; made if it is not there.
        progress: show a bar when it takes over two seconds.

    Raises:
        FingerprintError: if the codec that is there was made from something else.
        InputError: as `plan_codes`, or for keys that are not finite.
        StoreError: if the directory cannot be written.
    """
    plan = plan_codes(int(table.targets.sum()), identity.dim, config)
    wanted = fingerprint([identity.fingerprint, metric, plan.factory, config.to_dict()])
    make_directory(out)
    with waiting(out, "codec"):
        if (out / CODEC_RECORD).exists():
            return _there(out, wanted)

        def sample() -> NDArray[np.float32]:
            keys = _sample(model, corpus, table, tap, identity, config, progress)
            return prepare_keys(keys, metric).numpy()

        index = train_faiss(identity.dim, plan.factory, metric, sample, config.seed)
        write_faiss(index, out / CODEC)
        record = IndexRecord(
            engine="faiss",
            metric=metric,
            dim=identity.dim,
            entries=0,
            store_fingerprint=wanted,
            factory=plan.factory,
            nprobe=config.nprobe,
            train_size=plan.train_size,
            seed=config.seed,
            file=CODEC,
            checksum=checksum(out / CODEC),
        )
        write_json(out / CODEC_RECORD, record.to_dict())
        return Codec(index, record.checksum)


def encode(codec: Codec, keys: Tensor, identity: Identity, metric: str, label: str) -> Tensor:
    """Codes of the keys of one range, as a store of whole keys would have kept them.

    Raises:
        InputError: for keys that are not finite in the store's number format.
    """
    return codec.encode(prepare_keys(stored_keys(label, keys, len(keys), identity), metric))


def _there(out: Path, wanted: str) -> Codec:
    record = IndexRecord.read(out, CODEC_RECORD)
    if record.store_fingerprint != wanted:
        raise FingerprintError(
            f"{out} holds the codec {record.factory} of another model, text or setting "
            f"({record.store_fingerprint}), but this run has {wanted}; repeat the settings of the "
            "first run or choose another directory"
        )
    return Codec.read(out, record.checksum)


def _sample(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    table: WindowTable,
    tap: Tap,
    identity: Identity,
    config: IndexConfig,
    progress: bool,
) -> Tensor:
    """At least ``train_size`` keys (or all there are) of pieces of the text, in its order."""
    pieces = plan_ranges(table.targets.tolist(), identity.batch_tokens)
    order = np.random.default_rng(config.seed).permutation(len(pieces))
    rows = np.array([pieces[number].rows for number in order]).cumsum()
    count = int(np.searchsorted(rows, config.train_size)) + 1
    parts = []
    total = int(rows[min(count, len(rows)) - 1])
    with bar(total, label="sample", unit="key", quiet=not progress) as shown:
        for number in sorted(order[:count]):
            keys, *_ = extract_range(model, corpus, table, tap, identity, pieces[number])
            parts.append(stored_keys("sampled keys", keys, len(keys), identity))
            shown.update(len(keys))
    return torch.cat(parts)


def _code_size(dim: int, factory: str) -> int:
    import faiss

    return faiss.index_factory(dim, factory).sa_code_size()
