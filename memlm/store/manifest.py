"""The manifest: what a datastore is, what its bytes depend on, and what they are.

A datastore is a directory of entries (key, next token), cut into *planned ranges* of windows, one
shard of files per range. ``manifest.json`` holds three things:

* the *identity*: everything the bytes depend on (model, tokenizer, tap, corpus, windows, batch
  size, threads, number format). Two runs with one identity and one plan write the same bytes, so
  any of them may continue the other; a run with another identity is refused.
* the *plan*: which windows and how many entries each range has, fixed before the first forward.
* the *shards*: rows, sizes and checksums of every file, present once the store is complete.

Nothing about times, hosts or paths is in it: the manifest itself is byte-identical too. File names
are computed from range numbers and never taken from the manifest, so a store cannot point outside
its directory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from memlm.core.config import Config, check
from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.core.files import fingerprint, read_json, write_json

MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
BUILD_LOG = "build-log.jsonl"
DTYPES = ("float16", "bfloat16", "float32")
METRICS = ("l2", "ip", "cosine")
_FORMAT = "memlm-datastore"
_FORMAT_VERSION = 1


def shard_files(
    number: int, *, places: bool, merged: bool = False, coded: bool = False
) -> tuple[str, ...]:
    """The file names of one shard: keys (or codes), values and what else its entries have."""
    kinds = ["codes" if coded else "keys", "values"] + ["documents"] * places + ["merged"] * merged
    return tuple(f"{kind}-{number:05d}.safetensors" for kind in kinds)


@dataclass(frozen=True)
class Identity(Config):
    """Everything the bytes of a datastore depend on. None: unknown (imported entries).

    Attributes:
        model: name or path as the user gave it; only informative, not part of the fingerprint.
        model_hash: of the configuration and weights.
        tokenizer_hash: of the tokenizer.
        tap: which tensor of the model is the key.
        dim: length of a key.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        corpus_hash: of the tokens and document offsets.
        windows: the rule that cut the corpus, as its ``to_dict``.
        batch_tokens: padded tokens per forward pass, which decides who is padded to what;
            0 where no model was run.
        threads: CPU threads of the forward passes, which decide the order of sums.
        codec: checksum of what makes codes of keys, in a store of codes.
    """

    model: str
    model_hash: str | None
    tokenizer_hash: str | None
    tap: str
    dim: int
    dtype: str
    corpus_hash: str | None = None
    windows: Mapping[str, Any] = field(default_factory=dict)
    batch_tokens: int = 0
    threads: int | None = None
    codec: str | None = None

    def __post_init__(self) -> None:
        check(self.dim >= 1, f"dim must be at least 1, got {self.dim}")
        check(
            self.dtype in DTYPES,
            f"the dtype of keys must be one of {', '.join(DTYPES)}, got {self.dtype!r}",
        )

    @property
    def fingerprint(self) -> str:
        """Equal for equal bytes; the informative model name does not count."""
        values = self.to_dict()
        del values["model"]
        if self.codec is None:
            del values["codec"]
        return fingerprint(values)

    def differences(self, other: "Identity") -> list[str]:
        """What differs, in words: ``"dtype is 'float16' here and 'float32' there"``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name} is {mine[name]!r} here and {theirs[name]!r} there"
            for name in mine
            if name != "model" and fingerprint(mine[name]) != fingerprint(theirs[name])
        ]


class PlannedRange(NamedTuple):
    """Consecutive windows that make one shard.

    Attributes:
        first_window: number of the first window.
        last_window: one past the number of the last window, so that
            ``slice(first_window, last_window)`` spans them; the next range begins there.
        rows: entries, i.e. predicted tokens, in these windows.
    """

    first_window: int
    last_window: int
    rows: int


@dataclass(frozen=True)
class StoreInfo(Config):
    """What a datastore says about itself beyond its identity.

    Attributes:
        metric: how its keys are meant to be compared: ``"l2"``, ``"ip"`` or ``"cosine"``.
        places: whether every entry has a document and a position in it.
        merged: whether every entry has a weight and a successor, as `memlm.store.prune` leaves it.
        code_size: bytes of the code that stands for a key; None: keys are whole.
        documents: how many documents there are, None if unknown.
        vocab_size: size of the vocabulary; values are below it. None: not checked.
        corpus: informative description of the text (names, counts) as plain JSON values.
    """

    metric: str = "l2"
    places: bool = True
    merged: bool = False
    code_size: int | None = None
    documents: int | None = None
    vocab_size: int | None = None
    corpus: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(
            self.metric in METRICS,
            f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}",
        )
        check(
            self.vocab_size is None or self.vocab_size >= 1,
            f"vocab_size must be at least 1, got {self.vocab_size}",
        )
        check(
            self.code_size is None or self.code_size >= 1,
            f"code_size must be at least 1, got {self.code_size}",
        )
        check(
            self.documents is None or self.documents >= 1,
            f"documents must be at least 1, got {self.documents}",
        )

    def shard_files(self, number: int) -> tuple[str, ...]:
        """The file names of one shard."""
        return shard_files(
            number, places=self.places, merged=self.merged, coded=self.code_size is not None
        )


@dataclass(frozen=True)
class ShardRecord:
    """The files of one finished range.

    Attributes:
        number: of the planned range.
        rows: entries in it.
        sizes: bytes per file name.
        checksums: ``"xxh3_128:<hex>"`` per file name.
    """

    number: int
    rows: int
    sizes: Mapping[str, int]
    checksums: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; also the line a journal holds."""
        return {
            "range": self.number,
            "rows": self.rows,
            "sizes": dict(self.sizes),
            "checksums": dict(self.checksums),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], info: "StoreInfo") -> Self:
        """The record that ``to_dict`` wrote, of a store that says ``info`` about itself.

        Raises:
            InputError: if something is missing, mistyped or names a file that a shard of this
                number does not have.
        """
        try:
            number, rows = int(values["range"]), int(values["rows"])
            sizes = {str(name): int(size) for name, size in values["sizes"].items()}
            sums = {str(name): str(value) for name, value in values["checksums"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"a shard record is malformed ({error!r})") from error
        names = info.shard_files(number)
        expected = set(names) if number >= 0 else set()
        check(
            set(sizes) == expected == set(sums),
            f"shard {number} must have the files {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(set(sizes) | set(sums)))}",
        )
        return cls(number, rows, sizes, sums)


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        identity: what the bytes depend on.
        info: what else the store says about itself.
        ranges: the plan; shard i holds the entries of range i, in order.
        shards: one record per range once complete, none before.
        complete: whether the store can be read.
    """

    identity: Identity
    info: StoreInfo
    ranges: tuple[PlannedRange, ...]
    shards: tuple[ShardRecord, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        check(len(self.ranges) > 0, "a datastore must have at least one range, got none")
        place = self.ranges[0].first_window
        for number, planned in enumerate(self.ranges):
            check(
                planned.first_window == place and planned.last_window > place,
                f"ranges must follow one another without gaps, but range {number} spans windows "
                f"{planned.first_window} to {planned.last_window} after window {place}",
            )
            check(planned.rows >= 1, f"a range must have at least one row, got {planned.rows}")
            place = planned.last_window
        if self.complete:
            found = [(shard.number, shard.rows) for shard in self.shards]
            planned = [(number, item.rows) for number, item in enumerate(self.ranges)]
            check(
                found == planned,
                "a complete datastore must have one shard per range with its rows; "
                f"{len(self.ranges)} ranges do not match {len(self.shards)} shards",
            )

    def __len__(self) -> int:
        """Entries of the whole plan."""
        return sum(planned.rows for planned in self.ranges)

    @property
    def plan_fingerprint(self) -> str:
        """Of identity, settings and plan: equal for runs that may continue one another."""
        settings = [self.info.metric, self.info.places, self.info.vocab_size]
        settings += ["merged"] * self.info.merged
        settings += [] if self.info.code_size is None else ["codes", self.info.code_size]
        ranges = [list(planned) for planned in self.ranges]
        return fingerprint([self.identity.fingerprint, settings, ranges])

    @property
    def fingerprint(self) -> str:
        """Of the contents: identity, settings, plan and every checksum.

        Indexes, clusters and saved models refer to a store by it.
        """
        shards = [shard.to_dict() for shard in self.shards]
        return fingerprint([self.plan_fingerprint, shards])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "complete": self.complete,
            "fingerprint": self.fingerprint,
            "entries": len(self),
            "identity": self.identity.to_dict(),
            "info": self.info.to_dict(),
            "ranges": [list(planned) for planned in self.ranges],
            "shards": [shard.to_dict() for shard in self.shards],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = MANIFEST) -> Self:
        """The manifest that ``to_dict`` wrote.

        Args:
            values: parsed JSON.
            origin: the file, for messages.

        Raises:
            StoreError: if it was written by a newer memlm.
            CorruptStoreError: if it is malformed or does not match its own fingerprint.
        """
        if values.get("format") != _FORMAT:
            raise CorruptStoreError(
                f"{origin} must be the manifest of a memlm datastore, "
                f"got format {values.get('format')!r}; is the path right?"
            )
        version = values.get("format_version")
        if not isinstance(version, int) or version > _FORMAT_VERSION:
            raise StoreError(
                f"{origin} has format version {version!r}, newer than this memlm reads "
                f"({_FORMAT_VERSION}); upgrade memlm"
            )
        try:
            info = StoreInfo.from_dict(values["info"])
            manifest = cls(
                identity=Identity.from_dict(values["identity"]),
                info=info,
                ranges=tuple(
                    PlannedRange(*(int(item) for item in row)) for row in values["ranges"]
                ),
                shards=tuple(ShardRecord.from_dict(shard, info) for shard in values["shards"]),
                complete=values["complete"] is True,
            )
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptStoreError(
                f"{origin} is not a valid manifest ({error}); restore it from a copy or rebuild "
                "the store"
            ) from error
        if values.get("fingerprint") != manifest.fingerprint:
            raise CorruptStoreError(
                f"{origin} was altered: its fingerprint {values.get('fingerprint')} does not match "
                f"its contents ({manifest.fingerprint}); restore it from a copy or rebuild the "
                "store"
            )
        return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest of the datastore in the directory ``path``, complete or not.

    Raises:
        CorruptStoreError: if there is none or it is damaged.
        StoreError: if it was written by a newer memlm.
    """
    try:
        values = read_json(path / MANIFEST)
    except OSError as error:
        raise CorruptStoreError(
            f"{path / MANIFEST} must be a file that can be read but is not "
            f"({error.strerror or error}); is the path right?"
        ) from error
    return Manifest.from_dict(values, str(path / MANIFEST))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest of the datastore in the directory ``path`` atomically."""
    write_json(path / MANIFEST, manifest.to_dict())


def plan_ranges(rows_per_window: Sequence[int], shard_rows: int) -> tuple[PlannedRange, ...]:
    """Cut windows into ranges of at most ``shard_rows`` entries (one window at least).

    Args:
        rows_per_window: predicted tokens per window, e.g. ``WindowTable.targets``.
        shard_rows: most entries in a shard.

    Raises:
        InputError: if there are no windows or ``shard_rows`` is below 1.
    """
    check(shard_rows >= 1, f"shard_rows must be at least 1, got {shard_rows}")
    check(len(rows_per_window) > 0, "a datastore must have at least one window, got none")
    ranges, start, rows = [], 0, 0
    for number, count in enumerate(int(count) for count in rows_per_window):
        if rows and rows + count > shard_rows:
            ranges.append(PlannedRange(start, number, rows))
            start, rows = number, 0
        rows += count
    return (*ranges, PlannedRange(start, len(rows_per_window), rows))
