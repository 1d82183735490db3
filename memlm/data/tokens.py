"""Token corpora: all documents as one array of token ids, with the places where documents begin.

A corpus is a flat ``(n,)`` int32 array and ``(documents + 1,)`` offsets: document d is
``tokens[offsets[d]:offsets[d + 1]]``. Windows, datastores and perplexities all refer to tokens by
their place in this array, so its hash stands for the text in every fingerprint.

A language model predicts a token from the ones before it, so the first token of a document has
nothing to be predicted from. ``tokenize`` therefore puts a *begin* token (the tokenizer's bos, else
its eos) before every document: it is context only and never scored, and the first real token counts
like any other. Perplexities per byte or word need the sizes of the text itself, which are counted
here, where the text is last seen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

from memlm.core.config import check
from memlm.core.errors import InputError
from memlm.core.progress import bar

if TYPE_CHECKING:
    from memlm.data.documents import Document

Integers = NDArray[np.int64]

_BATCH_CHARACTERS = 1_000_000
_LARGEST_TOKEN = np.iinfo(np.int32).max


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Tokenised documents in one flat array.

    Attributes:
        tokens: ``(n,)`` int32, the ids of all documents one after another.
        offsets: ``(documents + 1,)`` int64, where each document begins; the last one is n.
        names: one name per document, to say later where a remembered token came from.
        text_bytes: ``(documents,)`` int64 UTF-8 bytes of each text, None if unknown.
        text_words: ``(documents,)`` int64 whitespace-separated words, None if unknown.
        text_characters: ``(documents,)`` int64 Unicode code points, None if unknown.
        begin_token: the id put before every document (context only, never scored), or None.

    Raises:
        InputError: if the arrays do not describe documents.
    """

    tokens: NDArray[np.int32]
    offsets: Integers
    names: tuple[str, ...]
    text_bytes: Integers | None = None
    text_words: Integers | None = None
    text_characters: Integers | None = None
    begin_token: int | None = None

    def __post_init__(self) -> None:
        tokens, offsets = self.tokens, self.offsets
        check(
            tokens.ndim == 1 and tokens.dtype == np.int32,
            f"tokens must be one row of int32, got {tokens.dtype} of shape {tokens.shape}; "
            "TokenCorpus.from_tokens converts other integers",
        )
        check(
            offsets.ndim == 1 and offsets.dtype == np.int64 and len(offsets) >= 2,
            "offsets must be one row of int64 with an entry per document and one more, "
            f"got {offsets.dtype} of shape {offsets.shape}",
        )
        check(
            offsets[0] == 0 and offsets[-1] == len(tokens) and bool((np.diff(offsets) >= 0).all()),
            f"offsets must rise from 0 to the number of tokens ({len(tokens)}), "
            f"got {offsets[0]} to {offsets[-1]}",
        )
        check(
            len(tokens) == 0 or int(tokens.min()) >= 0,
            f"token ids must not be negative, got {int(tokens.min(initial=0))}",
        )
        for label, sizes in (
            ("names", self.names),
            ("text_bytes", self.text_bytes),
            ("text_words", self.text_words),
            ("text_characters", self.text_characters),
        ):
            check(
                sizes is None or len(sizes) == self.documents,
                f"{label} must have one entry per document ({self.documents}), "
                f"got {0 if sizes is None else len(sizes)}",
            )

    @classmethod
    def from_tokens(
        cls,
        tokens: ArrayLike,
        offsets: ArrayLike | None = None,
        *,
        names: Sequence[str] | None = None,
        begin_token: int | None = None,
    ) -> Self:
        """A corpus of tokens that were made elsewhere; the text sizes stay unknown.

        Args:
            tokens: ``(n,)`` non-negative integers.
            offsets: ``(documents + 1,)`` where documents begin; None: one document.
            names: one per document; None: ``"0"``, ``"1"``, ...
            begin_token: the id that already stands before every document, if one does.

        Raises:
            InputError: if ids are not integers below 2**31 or the offsets do not fit.
        """
        array = np.asarray(tokens)
        check(
            array.dtype.kind in "iu" or array.size == 0,
            f"token ids must be integers, got {array.dtype}",
        )
        check(
            array.size == 0 or int(array.max()) <= _LARGEST_TOKEN,
            f"token ids must be below 2**31, got {int(array.max(initial=0))}",
        )
        bounds = np.array([0, array.size]) if offsets is None else np.asarray(offsets)
        count = max(bounds.size - 1, 0)
        return cls(
            tokens=np.ascontiguousarray(array, dtype=np.int32),
            offsets=np.ascontiguousarray(bounds, dtype=np.int64),
            names=tuple(str(number) for number in range(count)) if names is None else tuple(names),
            begin_token=begin_token,
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def documents(self) -> int:
        """How many documents there are, empty ones included."""
        return len(self.offsets) - 1

    @cached_property
    def hash(self) -> str:
        """xxh3-128 of the tokens and offsets (little-endian bytes), ``"xxh3_128:<hex>"``."""
        digest = xxhash.xxh3_128()
        digest.update(len(self).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").data)
        digest.update(np.ascontiguousarray(self.offsets, dtype="<i8").data)
        return f"xxh3_128:{digest.hexdigest()}"

    def document_of(self, index: ArrayLike) -> Integers:
        """The document that holds each token.

        Args:
            index: places in ``tokens``, any shape.

        Returns:
            int64 document numbers of the same shape. Empty documents hold nothing.
        """
        return np.searchsorted(self.offsets, np.asarray(index), side="right") - 1

    def describe(self) -> dict[str, Any]:
        """Counts and hash as plain JSON values, for manifests and protocol lines."""
        return {
            "documents": self.documents,
            "tokens": len(self),
            "text_bytes": None if self.text_bytes is None else int(self.text_bytes.sum()),
            "text_words": None if self.text_words is None else int(self.text_words.sum()),
            "begin_token": self.begin_token,
            "hash": self.hash,
        }


def tokenize(
    documents: "Iterable[Document]",
    tokenizer: Any,
    *,
    begin: bool = True,
    end: bool = True,
    progress: bool = True,
) -> TokenCorpus:
    """Turn documents into a corpus, in order.

    Args:
        documents: named texts, e.g. from ``read_documents``.
        tokenizer: a Hugging Face tokenizer; a fast one works in large batches.
        begin: put the bos token (eos where there is none) before every document, as context.
        end: put the eos token, if the tokenizer has one, after every document; it is scored.
        progress: show a bar when it takes over two seconds.

    Returns:
        The corpus. Documents of fewer than two tokens stay in it but give nothing to predict.

    Raises:
        InputError: if there are no documents or no token to predict in any of them.
    """
    first = getattr(tokenizer, "bos_token_id", None)
    last = getattr(tokenizer, "eos_token_id", None)
    begin_token = (last if first is None else first) if begin else None
    end_token = last if end else None
    prefix = [] if begin_token is None else [begin_token]
    suffix = [] if end_token is None else [end_token]

    names: list[str] = []
    sizes: list[tuple[int, int, int, int]] = []
    pieces: list[NDArray[np.int32]] = []
    batch: list[str] = []
    waiting = 0

    with bar(None, label="tokenize", unit="token", quiet=not progress) as shown:

        def flush() -> None:
            nonlocal waiting
            ids = _encode(tokenizer, batch)
            for text, row in zip(batch, ids, strict=True):
                count = len(prefix) + len(row) + len(suffix)
                sizes.append((count, len(text.encode()), len(text.split()), len(text)))
            flat = chain.from_iterable(chain(prefix, row, suffix) for row in ids)
            total = sum(size[0] for size in sizes[len(sizes) - len(batch) :])
            pieces.append(np.fromiter(flat, dtype=np.int32, count=total))
            shown.update(total)
            batch.clear()
            waiting = 0

        for document in documents:
            names.append(document.name)
            batch.append(document.text)
            waiting += len(document.text)
            if waiting >= _BATCH_CHARACTERS:
                flush()
        if batch:
            flush()

    check(bool(names), "there must be at least one document to tokenise, got none")
    counts, text_bytes, words, characters = np.array(sizes, dtype=np.int64).T
    if int(counts.max()) < 2:
        raise InputError(
            "a text must have at least two tokens, counting the begin and end tokens, so that one "
            f"can be predicted from another; the longest of {len(names)} documents has "
            f"{int(counts.max())}: give more text"
        )
    return TokenCorpus(
        tokens=np.concatenate(pieces),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)]),
        names=tuple(names),
        text_bytes=text_bytes.copy(),
        text_words=words.copy(),
        text_characters=characters.copy(),
        begin_token=begin_token,
    )


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # verbose=False: texts longer than the model's context are expected, windows cut them later.
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]
