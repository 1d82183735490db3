"""Pairs of texts: what an encoder reads, and what a decoder writes.

A `PairCorpus` is two token corpora of equally many documents: source i belongs to target i. Targets
are what the model learns to write, end token included; every one of their tokens is predicted.

    decoder input     start   y_1   y_2   ...
    label             y_1     y_2   ...   end        one entry of a datastore each

Pairs are read from lines of two texts with a tab between, or from the fields of a .jsonl file.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.files import fingerprint
from memlm.data.batches import IGNORED
from memlm.data.documents import read_documents, read_records
from memlm.data.tokens import TokenCorpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Pair(NamedTuple):
    """A source and its target."""

    source: str
    target: str


@dataclass(frozen=True, eq=False)
class PairCorpus:
    """Tokenised pairs.

    Attributes:
        sources: one document per pair.
        targets: one document per pair, not empty.

    Raises:
        InputError: if there are not equally many, or a target or source is empty.
    """

    sources: TokenCorpus
    targets: TokenCorpus

    def __post_init__(self) -> None:
        check(
            self.sources.documents == self.targets.documents,
            "every source must have a target, got "
            f"{self.sources.documents} sources and {self.targets.documents} targets",
        )
        for name, corpus in (("source", self.sources), ("target", self.targets)):
            empty = np.flatnonzero(np.diff(corpus.offsets) == 0)
            check(
                len(empty) == 0,
                f"no {name} may be empty, but that of pair {empty[0] if len(empty) else 0} is",
            )

    @classmethod
    def from_tokens(cls, sources: Iterable[Any], targets: Iterable[Any]) -> "PairCorpus":
        """Pairs of token ids that were made elsewhere, end tokens included."""
        return cls(_corpus(sources), _corpus(targets))

    def __len__(self) -> int:
        """Pairs."""
        return self.targets.documents

    @property
    def hash(self) -> str:
        """Fingerprint of the tokens on both sides."""
        return fingerprint({"sources": self.sources.hash, "targets": self.targets.hash})

    def batches(
        self, batch_tokens: int, span: slice | None = None
    ) -> Iterator[tuple["PairBatch", NDArray[np.int64]]]:
        """Pairs of similar length beside each other, padded on the right.

        Args:
            batch_tokens: most padded tokens of both sides; a longer pair stands alone.
            span: the pairs to cover; None: all.

        Yields:
            A batch without padding token (0 stands there, masked), and the numbers of its pairs.
        """
        start, stop, _ = (span or slice(None)).indices(len(self))
        widths = np.stack([np.diff(x.offsets)[start:stop] for x in (self.sources, self.targets)])
        order = np.argsort(-widths.sum(0), kind="stable")
        place = 0
        while place < len(order):
            rows = 1
            while place + rows < len(order):
                wider = widths[:, order[place : place + rows + 1]].max(1).sum()
                if wider * (rows + 1) > batch_tokens:
                    break
                rows += 1
            numbers = start + order[place : place + rows]
            yield self.batch(numbers), numbers
            place += rows

    def batch(self, numbers: Iterable[int]) -> "PairBatch":
        """Some pairs beside each other."""
        sides = []
        for corpus in (self.sources, self.targets):
            spans = [(corpus.offsets[number], corpus.offsets[number + 1]) for number in numbers]
            rows = [torch.from_numpy(corpus.tokens[a:b].astype(np.int64)) for a, b in spans]
            sides.append(torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=IGNORED))
        sources, labels = sides
        return PairBatch(sources.clamp(min=0), (sources != IGNORED).long(), labels)


class PairBatch(NamedTuple):
    """Pairs beside each other.

    Attributes:
        input_ids: ``(rows, source)`` int64.
        attention_mask: ``(rows, source)`` int64, 0 for padding.
        labels: ``(rows, target)`` int64, -100 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def read_pairs(
    path: str | Path,
    *,
    source: str = "source",
    target: str = "target",
    limit: int | None = None,
) -> list[Pair]:
    """Pairs of a file.

    Args:
        path: lines of source, tab, target (further columns are left out); or a .jsonl file, whose
            records have both fields, themselves or under ``"translation"``. Also compressed.
        source: name of the field.
        target: name of the field.
        limit: stop after so many.

    Raises:
        InputError: if a line is no pair, or there is none.
    """
    path = Path(path)
    check(limit is None or limit >= 1, f"limit must be at least 1 pair, got {limit}")
    is_records = ".jsonl" in path.suffixes
    found = []
    for pair in _records(path, source, target) if is_records else _lines(path):
        found.append(pair)
        if len(found) == limit:
            break
    check(bool(found), f"there must be at least one pair, but {path} holds none")
    return found


def tokenize_pairs(
    pairs: Iterable[Pair],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    source_length: int = 1024,
    target_length: int = 128,
) -> PairCorpus:
    """Pairs as tokens, with the special tokens that the tokenizer puts around each side.

    Args:
        pairs: the texts.
        tokenizer: of the model; a target is tokenised as one (``text_target``).
        source_length: tokens of a source at most; what is too many is cut off at its end.
        target_length: alike.
    """
    pairs = list(pairs)
    sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
    read = tokenizer(sources, truncation=True, max_length=source_length)
    written = tokenizer(text_target=targets, truncation=True, max_length=target_length)
    return PairCorpus.from_tokens(read["input_ids"], written["input_ids"])


def _corpus(rows: Iterable[Any]) -> TokenCorpus:
    kept = [np.asarray(row, dtype=np.int64) for row in rows]
    check(bool(kept), "there must be at least one pair, got none")
    return TokenCorpus.from_tokens(np.concatenate(kept), np.cumsum([0, *map(len, kept)]))


def _lines(path: Path) -> Iterator[Pair]:
    for document in read_documents(path, separator="\n"):
        if not document.text.strip():
            continue
        columns = document.text.split("\t")
        if len(columns) < 2:
            raise InputError(
                f"a line must be a source, a tab and a target, got none of that in {document.name}"
            )
        yield Pair(columns[0], columns[1])


def _records(path: Path, source: str, target: str) -> Iterator[Pair]:
    for where, record in read_records(path):
        inner = record.get("translation", record) if isinstance(record, dict) else {}
        if not all(isinstance(inner.get(name), str) for name in (source, target)):
            raise InputError(
                f"{where} must have texts under {source!r} and {target!r}, got "
                f"{sorted(inner) or type(record).__name__}; name the fields"
            )
        yield Pair(inner[source], inner[target])
