"""The deep check of a datastore: compute some of its keys again and compare.

A batch is the smallest thing that can be repeated exactly, because padding changes the low bits of
hidden states; so whole planned ranges are drawn, seeded, until enough entries are covered. On the
device type and versions that built the store the keys must be equal; elsewhere they may differ by
rounding, and the tolerance is stated in the report.
"""

from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memlm.core.config import check
from memlm.core.errors import FingerprintError
from memlm.data.tokens import TokenCorpus
from memlm.data.windows import windows_from_dict
from memlm.extract.coding import encode
from memlm.extract.ranges import extract_range
from memlm.models.fingerprint import model_hash, tokenizer_hash
from memlm.models.taps import find_tap
from memlm.store.reader import Datastore
from memlm.store.verify import VerifyReport

_RELATIVE_TOLERANCE = 2e-2


def recompute_sample(
    report: VerifyReport,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: TokenCorpus,
    *,
    entries: int = 4096,
    seed: int = 0,
) -> VerifyReport:
    """Add the deep check to a report of `store.verify.verify`.

    Args:
        report: of a quick or full check; returned unchanged if it found problems.
        model: the model the store was built with.
        tokenizer: its tokenizer, None for a store built from tokens.
        corpus: the text the store was built from, tokenised.
        entries: compute at least so many entries again (or all there are).
        seed: of the choice of ranges.

    Raises:
        FingerprintError: if model, tokenizer or text are not those of the store.
        InputError: if the store was imported and has no plan to repeat.
    """
    check(entries >= 1, f"entries must be at least 1, got {entries}")
    if not report.ok:
        return report
    store = Datastore.open(report.path)
    identity = store.manifest.identity
    for what, found, expected in (
        ("model", model_hash(model), identity.model_hash),
        ("text", corpus.hash, identity.corpus_hash),
        ("tokenizer", tokenizer_hash(tokenizer) if tokenizer else "none", identity.tokenizer_hash),
    ):
        if found != expected:
            raise FingerprintError(
                f"the {what} must be the one the store was built with ({expected}), got {found}; "
                f"pass the same {what}"
            )
    table = windows_from_dict(identity.windows).table(corpus)
    tap = find_tap(model, identity.tap)
    starts = np.cumsum([0, *(planned.rows for planned in store.manifest.ranges)])
    covered, equal, worst, problems = 0, 0, 0.0, []
    for number in np.random.default_rng(seed).permutation(len(store.manifest.ranges)):
        rows = slice(int(starts[number]), int(starts[number + 1]))
        keys, values, documents, positions = extract_range(
            model, corpus, table, tap, identity, store.manifest.ranges[number]
        )
        if store.codec is not None:
            codes = encode(store.codec, keys, identity, store.metric, f"keys of range {number}")
            keys = store.codec.decode(codes).to(store.dtype)
        stored = store.gather(torch.arange(rows.start, rows.stop)).float()
        difference = (stored - keys.float()).norm(dim=1) / keys.float().norm(dim=1).clamp(min=1e-6)
        covered += len(keys)
        equal += int((difference == 0).sum())
        worst = max(worst, float(difference.max()))
        if worst > _RELATIVE_TOLERANCE:
            problems.append(
                f"keys of range {number} differ from those computed again by up to {worst:.3g} of "
                f"their length (tolerance {_RELATIVE_TOLERANCE}); rebuild the store"
            )
        places = [(values, store.values)]
        if store.documents is not None and store.positions is not None:
            places += [(documents, store.documents), (positions, store.positions)]
        if not all(torch.equal(again, kept[rows]) for again, kept in places):
            problems.append(f"values or places of range {number} differ; rebuild the store")
        if covered >= entries:
            break
    line = (
        f"{covered:,} entries computed again: {equal:,} keys equal to the bit, largest relative "
        f"difference {worst:.2g} (tolerance {_RELATIVE_TOLERANCE})"
    )
    return replace(report, checked=(*report.checked, line), problems=tuple(problems))
