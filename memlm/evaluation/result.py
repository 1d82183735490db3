"""An evaluation: sums of losses, and everything needed to say what they mean and to repeat them.

Perplexity is token-weighted: with the summed negative log-likelihood ``nll_d`` (nats) and count of
every document d,

    perplexity      = exp( sum_d nll_d / sum_d tokens_d )
    bits per byte   = sum_d nll_d / (log 2 * sum_d bytes_d)
    word perplexity = exp( sum_d nll_d / sum_d words_d )

Perplexity depends on the tokenizer; bits per byte and word perplexity do not, so they compare
models. Both use only documents that were scored whole: the loss of half a document says nothing
about the bytes of all of it. Bytes are UTF-8; words are separated by white space. The loss of an
end token counts, its text is empty.

A number without its protocol cannot be compared with anything, so the protocol is part of the
result: windows, what was scored, boundaries, begin token, memory with its recall, log base.

Differs from the papers' code: `run_clm.py` prints the exponential of the mean of *batch means*,
which gives short windows the weight of full ones and moves with the batch size. It is here as
`Evaluation.trainer_perplexity`, only to compare with numbers printed by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from memlm.core.config import Config, check
from memlm.core.errors import InputError
from memlm.core.files import read_json, write_json
from memlm.evaluation.bootstrap import (
    LEVEL,
    RESAMPLES,
    SEED,
    Interval,
    perplexity_interval,
    ratio_interval,
)
from memlm.evaluation.protocol import protocol_line


@dataclass(frozen=True)
class DocumentSums(Config):
    """What was summed for every document of the corpus, in order; all are ``(documents,)``.

    Attributes:
        names: the documents' names.
        nll: summed negative log-likelihood of the scored tokens, nats.
        tokens: scored tokens.
        unscored: tokens that were not scored, begin tokens not counted.
        bytes: UTF-8 bytes of the text, None if the corpus does not know.
        words: whitespace-separated words, None if unknown.
        characters: Unicode code points, None if unknown.
    """

    names: tuple[str, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    unscored: tuple[int, ...]
    bytes: tuple[int, ...] | None = None
    words: tuple[int, ...] | None = None
    characters: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for label, values in (
            ("nll", self.nll),
            ("tokens", self.tokens),
            ("unscored", self.unscored),
            ("bytes", self.bytes),
            ("words", self.words),
            ("characters", self.characters),
        ):
            check(
                values is None or len(values) == len(self.names),
                f"{label} must have one entry per document ({len(self.names)}), "
                f"got {0 if values is None else len(values)}",
            )
        check(sum(self.tokens) > 0, "an evaluation must have at least one scored token, got none")


@dataclass(frozen=True)
class WindowSums(Config):
    """What was summed for every window, in text order; both are ``(windows,)``.

    Attributes:
        nll: summed negative log-likelihood, nats.
        tokens: scored tokens.
    """

    nll: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Seconds(Config):
    """Wall-clock seconds.

    Attributes:
        model: forward passes and the language-model head.
        memory: search, scoring and merging.
        total: the whole evaluation, planning included, fingerprints not.
    """

    model: float
    memory: float
    total: float


@dataclass(frozen=True)
class Comparison(Config):
    """One evaluation against another on the same documents.

    Attributes:
        ratio: perplexity of the first divided by that of the second; below 1, the first is better.
        low: lower end of the paired bootstrap interval, None with fewer than two documents.
        high: upper end, None likewise.
        level: share of the draws inside.
        documents: scored documents.
    """

    ratio: float
    low: float | None
    high: float | None
    level: float
    documents: int

    def describe(self) -> str:
        """One line, e.g. ``"ratio 0.912 (95 % interval 0.905 to 0.919 over 60 documents)"``."""
        if self.low is None or self.high is None:
            return f"ratio {self.ratio:.4f} (one document: no interval)"
        return (
            f"ratio {self.ratio:.4f} ({self.level:.0%} interval {self.low:.4f} to "
            f"{self.high:.4f} over {self.documents} documents)"
        )


_PARTS: dict[str, type[Config]] = {
    "documents": DocumentSums,
    "windows": WindowSums,
    "seconds": Seconds,
}


@dataclass(frozen=True)
class Evaluation(Config):
    """The result of `evaluate`; JSON in and out.

    Attributes:
        protocol: how the numbers were made, see `memlm.evaluation.protocol`.
        documents: sums per document.
        windows: sums per window.
        seconds: where the time went.
        model: name, hash, dtype, device and tap of the model.
        corpus: counts and hash of the corpus.
        versions: of the packages the numbers depend on.
        memory_stats: what the steps of a memory with state cost: ``steps``, ``searches``,
            ``saved`` (the fraction of saved searches, 1 - searches / steps) and ``foss_legacy``
            (what the papers' code prints for it); None where nothing was counted.
        token_log_probabilities: ``(tokens,)`` float64 in text order, if they were kept; not part
            of the JSON.
    """

    format_version: ClassVar[int] = 1

    protocol: dict[str, Any]
    documents: DocumentSums
    windows: WindowSums
    seconds: Seconds
    model: dict[str, Any]
    corpus: dict[str, Any]
    versions: dict[str, str]
    memory_stats: dict[str, Any] | None = None
    token_log_probabilities: NDArray[np.float64] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return sum(self.documents.tokens)

    @property
    def nll(self) -> float:
        """Summed negative log-likelihood, nats."""
        return float(np.sum(self.documents.nll))

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, nats."""
        return self.nll / self.tokens

    @property
    def perplexity(self) -> float:
        """Token-weighted perplexity per token."""
        return _exponential(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte over the documents scored whole; None if there are none to count."""
        nll, count = self._whole(self.documents.bytes)
        return nll / count / float(np.log(2)) if count else None

    @property
    def word_perplexity(self) -> float | None:
        """Perplexity per whitespace-separated word over the documents scored whole, or None."""
        nll, count = self._whole(self.documents.words)
        return _exponential(nll / count) if count else None

    @property
    def whole_documents(self) -> int:
        """How many documents were scored whole: all their tokens, the very first apart."""
        return int(self._scored_whole().sum())

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second of wall-clock time."""
        return self.tokens / max(self.seconds.total, 1e-9)

    @property
    def saved(self) -> float | None:
        """The fraction of saved searches; None if searches were not counted."""
        return None if self.memory_stats is None else self.memory_stats["saved"]

    @property
    def memory_is_on(self) -> bool:
        """Whether a memory took part."""
        return self.protocol["memory"] is not None

    def interval(
        self, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = SEED
    ) -> Interval | None:
        """The bootstrap interval of the perplexity over documents; None with a single document."""
        return perplexity_interval(
            self.documents.nll, self.documents.tokens, resamples=resamples, level=level, seed=seed
        )

    def trainer_perplexity(self, batch_size: int) -> float:
        """The number that `run_clm.py` prints: ``exp`` of the mean of batch means.

        Every batch of ``batch_size`` consecutive windows has a mean loss over its tokens; these
        are averaged over windows. Not token-weighted: only to compare with published numbers.

        Raises:
            InputError: if ``batch_size`` is below 1.
        """
        check(batch_size >= 1, f"batch_size must be at least 1 window, got {batch_size}")
        nll, tokens = np.asarray(self.windows.nll), np.asarray(self.windows.tokens)
        starts = np.arange(0, len(nll), batch_size)
        sizes = np.diff(np.append(starts, len(nll)))
        means = np.add.reduceat(nll, starts) / np.add.reduceat(tokens, starts)
        return _exponential(float((means * sizes).sum() / len(nll)))

    def compare(
        self,
        other: "Evaluation",
        *,
        resamples: int = RESAMPLES,
        level: float = LEVEL,
        seed: int = SEED,
    ) -> Comparison:
        """The ratio of this perplexity to another's, with its paired bootstrap interval.

        Raises:
            InputError: if the two did not score the same tokens of the same corpus.
        """
        if self.corpus["hash"] != other.corpus["hash"]:
            raise InputError(
                "two evaluations can only be compared on the same corpus, got "
                f"{self.corpus['hash']} and {other.corpus['hash']}; evaluate both on one"
            )
        if self.documents.tokens != other.documents.tokens:
            raise InputError(
                "two evaluations can only be compared if they scored the same tokens, got "
                f"{self.tokens:,} and {other.tokens:,} of the same corpus; use the same windows"
            )
        interval = ratio_interval(
            self.documents.nll,
            other.documents.nll,
            self.documents.tokens,
            resamples=resamples,
            level=level,
            seed=seed,
        )
        return Comparison(
            ratio=_exponential(self.loss - other.loss),
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
            level=level,
            documents=sum(count > 0 for count in self.documents.tokens),
        )

    def describe(self) -> str:
        """The protocol in one line, to print with every number."""
        return protocol_line(self.protocol, self.memory_stats)

    def summary(self) -> dict[str, Any]:
        """The headline numbers as plain JSON values; derived, so not read back."""
        interval = self.interval()
        return {
            "perplexity": _finite(self.perplexity),
            "interval": "one document: no interval" if interval is None else interval._asdict(),
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "word_perplexity": _finite(self.word_perplexity),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            **({} if self.saved is None else {"saved": self.saved}),
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the token log-probabilities as plain JSON values."""
        values = super().to_dict()
        del values["token_log_probabilities"]
        return {**values, "summary": self.summary()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The evaluation that ``to_dict`` wrote.

        Raises:
            InputError: for another class, a newer format or missing parts.
        """
        rest = {name: value for name, value in values.items() if name != "summary"}
        needed = {"protocol", "model", "corpus", "versions", *_PARTS}
        if missing := sorted(needed - set(rest)):
            raise InputError(
                f"an evaluation must have {', '.join(sorted(needed))}, but {', '.join(missing)} "
                "is missing; is this the JSON of an evaluation?"
            )
        parts = {name: kind.from_dict(rest[name]) for name, kind in _PARTS.items()}
        return super().from_dict({**rest, **parts})

    def save(self, path: str | Path) -> None:
        """Write the evaluation as JSON, atomically.

        Raises:
            StoreError: if the disk refuses.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The evaluation that ``save`` wrote.

        Raises:
            CorruptStoreError: if the file is missing or no JSON.
            InputError: if the JSON is not an evaluation.
        """
        return cls.from_dict(read_json(Path(path)))

    def _scored_whole(self) -> NDArray[np.bool_]:
        # Without a begin token the first token of a document has nothing to be predicted from.
        allowed = 1 if self.corpus.get("begin_token") is None else 0
        sums = self.documents
        return (np.asarray(sums.unscored) <= allowed) & (np.asarray(sums.tokens) > 0)

    def _whole(self, sizes: tuple[int, ...] | None) -> tuple[float, int]:
        if sizes is None:
            return 0.0, 0
        whole = self._scored_whole()
        return float(np.asarray(self.documents.nll)[whole].sum()), int(
            np.asarray(sizes)[whole].sum()
        )


def _exponential(value: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _finite(value: float | None) -> float | None:
    # JSON has no infinity.
    return value if value is not None and np.isfinite(value) else None
