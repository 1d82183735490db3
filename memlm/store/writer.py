"""Writing a datastore: any number of workers, killed at any moment, the same bytes.

A store is written range by range, in any order, by whoever claims a range first. A finished range
is a set of whole files and then one line in ``journal.jsonl``; the line is the truth. What a killed
worker left half-done has no line, its lock is released by the kernel, and the next worker does the
range again. When every range has its line, ``finalize`` turns the journal into the manifest::

    open     manifest.json (complete: false)      identity and plan, refused if they differ
    write    keys-, values-, documents-00007.safetensors, then a line in journal.jsonl
    finalize manifest.json (complete: true, checksums), journal removed

Bytes depend on identity, plan and entries alone. Times, hosts and versions go to
``build-log.jsonl``, which is outside the store's identity.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
import xxhash
from filelock import Timeout
from safetensors.torch import save

from memlm.core.config import check
from memlm.core.errors import InputError, StoreError
from memlm.core.files import (
    TEMPORARY,
    link_or_copy,
    remove_temporaries,
    sync_directory,
    write_atomic,
)
from memlm.core.journal import Journal
from memlm.store.build_log import note
from memlm.store.directory import (
    LOCKS,
    lock,
    locked,
    make_directory,
    not_writable,
    same_manifest,
)
from memlm.store.entries import (
    Column,
    stored_codes,
    stored_integers,
    stored_keys,
)
from memlm.store.manifest import (
    JOURNAL,
    Identity,
    Manifest,
    PlannedRange,
    ShardRecord,
    StoreInfo,
    read_manifest,
    write_manifest,
)
from memlm.store.reader import Datastore, read_tensor, size_problem

_LOWEST = {"weight": 1, "successor": -1}


class StoreWriter:
    """A datastore being built. Cheap to make; every worker opens its own.

    Attributes:
        path: the directory.
        manifest: identity and plan (and the shards, if the store was complete when opened).
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._journal = Journal(path / JOURNAL)

    @classmethod
    def open(
        cls,
        path: str | Path,
        identity: Identity,
        ranges: Sequence[PlannedRange],
        *,
        info: StoreInfo | None = None,
    ) -> Self:
        """Begin a datastore in the directory ``path`` or continue the one that is there.

        A complete store of the same identity and plan opens with nothing pending, so that the
        command that built it can be repeated.

        Args:
            path: a new or empty directory, or one that this build began.
            identity: what the bytes depend on.
            ranges: the plan, the same for every worker.
            info: what else the store says about itself; of the first run when continuing.

        Raises:
            FingerprintError: if the directory holds a store of another identity or plan.
            StoreError: if the directory holds other files, a newer format, or cannot be written.
            InputError: if the ranges do not follow one another.
        """
        path = Path(path)
        fresh = Manifest(identity, info or StoreInfo(), tuple(ranges))
        make_directory(path)
        # A store that is there is compared before anything of ours is put beside it.
        manifest = same_manifest(path, fresh)
        if manifest is None or not manifest.complete:
            try:
                with locked(path):
                    manifest = same_manifest(path, fresh)
                    if manifest is None:
                        manifest = fresh
                        write_manifest(path, fresh)
            except StoreError:
                manifest = same_manifest(path, fresh)
                if manifest is None or not manifest.complete:
                    raise
                # Another worker has completed the store and removed the locks under our hands.
        writer = cls(path, manifest)
        if manifest.complete:
            writer._tidy()
        else:
            note(writer.path, "open", pending=len(writer.pending()))
        return writer

    @property
    def complete(self) -> bool:
        """Whether the store was complete when opened, or has been finalized here."""
        return self.manifest.complete

    def pending(self) -> list[int]:
        """Numbers of the ranges that are not finished, ascending.

        A range counts as finished when the journal has a line for it that fits the plan and its
        files have the sizes the line says.
        """
        # The journal goes away after the manifest is complete, so it has to be read first.
        finished = self._finished()
        if self._completed_elsewhere():
            return []
        return [number for number in range(len(self.manifest.ranges)) if number not in finished]

    def finished_rows(self) -> int:
        """Entries in finished ranges, to start a progress bar from."""
        left = sum(self.manifest.ranges[number].rows for number in self.pending())
        return len(self.manifest) - left

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Hold a range for the block, without waiting.

        Yields:
            True if the range is ours to do; False if another worker holds it or has finished it.
            The kernel releases the claim when the process dies.

        Raises:
            InputError: if there is no such range.
            StoreError: if the lock cannot be written.
        """
        self._check_number(number)
        try:
            if self._completed_elsewhere():
                yield False
                return
            held = lock(self.path, f"range-{number:05d}")
            held.acquire(timeout=0)
        except Timeout:
            yield False
            return
        except OSError as error:
            if not self._completed_elsewhere():  # else the locks went away with the last range
                raise not_writable(self.path, error) from error
            yield False
            return
        try:
            # Another worker may have finished the range, or the store, before the lock was ours.
            mine = number not in self._finished([number]) and not self._completed_elsewhere()
            if mine:
                self._remove_leftovers(number)
            yield mine
        finally:
            held.release()
            if self._completed_elsewhere():
                self._tidy()  # our lock file came after the other worker removed them

    def write(
        self,
        number: int,
        keys: Column,
        values: Column,
        documents: Column | None = None,
        positions: Column | None = None,
        weights: Column | None = None,
        successors: Column | None = None,
    ) -> None:
        """Write the entries of one range; on return they are on disk for good.

        Args:
            number: of the planned range.
            keys: ``(rows, dim)`` floating point, converted to the store's dtype; in a store of
                codes ``(rows, code_size)`` uint8.
            values: ``(rows,)`` integers, the token that followed each key.
            documents: ``(rows,)`` integers, the document of that token.
            positions: ``(rows,)`` integers, the place of that token in its document.
            weights: ``(rows,)`` integers from 1, how many entries of a full store each stands for.
            successors: ``(rows,)`` integers, the entry that follows each in the text; -1: none.

        Raises:
            InputError: if shapes do not fit the plan, keys are not finite in the store's dtype, or
                integers are negative or too large.
            StoreError: if the disk refuses, or the store is complete.
        """
        self._check_number(number)
        if self.complete:
            raise StoreError(f"the datastore {self.path} is complete; its ranges cannot be written")
        planned = self.manifest.ranges[number]
        identity = self.manifest.identity
        where = f"range {number}"
        size = self.manifest.info.code_size
        tensors = [
            {"keys": stored_keys(f"keys of {where}", keys, planned.rows, identity)}
            if size is None
            else {"codes": stored_codes(f"keys of {where}", keys, planned.rows, size)},
            {
                "values": stored_integers(
                    f"values of {where}", values, planned.rows, self.manifest.info.vocab_size
                )
            },
        ]
        optional = {
            "documents and positions": ("places", {"document": documents, "position": positions}),
            "weights and successors": ("merged", {"weight": weights, "successor": successors}),
        }
        for what, (setting, columns) in optional.items():
            wanted = getattr(self.manifest.info, setting)
            given = [column for column in columns.values() if column is not None]
            check(
                len(given) == (len(columns) if wanted else 0),
                f"{where} must come {'with' if wanted else 'without'} {what}, as the store was "
                f"opened with {setting}={wanted}, got {len(given)} of these columns",
            )
            if wanted:
                tensors.append(
                    {
                        name: stored_integers(
                            f"{name}s of {where}", column, planned.rows, lowest=_LOWEST.get(name, 0)
                        )
                        for name, column in columns.items()
                        if column is not None
                    }
                )
        sizes, checksums = {}, {}
        names = self.manifest.info.shard_files(number)
        for name, content in zip(names, tensors, strict=True):
            sizes[name], checksums[name] = self._put(name, content)
        self._journal.append(ShardRecord(number, planned.rows, sizes, checksums).to_dict())
        note(self.path, "range", number=number, rows=planned.rows)

    def adopt(
        self,
        number: int,
        store: Datastore,
        shard: int,
        documents: Column | None = None,
    ) -> None:
        """Take over a whole shard of another store: its files get a second name, nothing is copied.

        Args:
            number: of the planned range.
            store: with the same kind of entries.
            shard: of that store.
            documents: ``(rows,)`` other numbers for the entries' documents; None: as they are.

        Raises:
            InputError: if the shard does not fit the plan.
            StoreError: if the disk refuses, or the store is complete.
        """
        self._check_number(number)
        theirs, info = store.manifest.shards[shard], self.manifest.info
        check(
            theirs.rows == self.manifest.ranges[number].rows,
            f"range {number} must have {self.manifest.ranges[number].rows} rows, got a shard of "
            f"{theirs.rows}",
        )
        sizes, checksums = {}, {}
        pairs = zip(info.shard_files(number), store.manifest.info.shard_files(shard), strict=True)
        for name, old in pairs:
            if documents is not None and name.startswith("documents"):
                old_places = store.path / old
                position = read_tensor(old_places, "position", (theirs.rows,), torch.int32)
                label = f"documents of range {number}"
                places = {
                    "document": stored_integers(label, documents, theirs.rows),
                    "position": position.clone(),
                }
                sizes[name], checksums[name] = self._put(name, places)
            else:
                link_or_copy(store.path / old, self.path / name)
                sizes[name], checksums[name] = theirs.sizes[old], theirs.checksums[old]
        self._journal.append(ShardRecord(number, theirs.rows, sizes, checksums).to_dict())
        note(self.path, "range", number=number, rows=theirs.rows)

    def finalize(self) -> Datastore:
        """Turn the finished ranges into a complete store and open it.

        Any worker may call it, also several at once or again.

        Raises:
            StoreError: if ranges are pending, or the disk refuses.
            CorruptStoreError: if a file of a complete store was damaged.
        """
        if not self.complete:
            try:
                with locked(self.path):
                    self._complete()
            except StoreError:
                if not self._completed_elsewhere():
                    raise
                self.manifest = read_manifest(self.path)
            self._tidy()
        return Datastore.open(self.path)

    def _put(self, name: str, content: dict[str, torch.Tensor]) -> tuple[int, str]:
        """Write one file; its size and checksum."""
        data = save(content)
        write_atomic(self.path / name, lambda file: file.write(data))
        return len(data), f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"

    def _completed_elsewhere(self) -> bool:
        return self.complete or read_manifest(self.path).complete

    def _complete(self) -> None:
        manifest = read_manifest(self.path)
        if not manifest.complete:
            finished = self._finished()
            left = [number for number in range(len(manifest.ranges)) if number not in finished]
            if left:
                shown = ", ".join(str(number) for number in left[:10])
                raise StoreError(
                    f"all {len(manifest.ranges)} ranges of {self.path} must be finished, but "
                    f"{len(left)} are not ({shown}{', ...' if len(left) > 10 else ''}); run the "
                    "same command again to continue"
                )
            shards = tuple(finished[number] for number in range(len(manifest.ranges)))
            manifest = replace(manifest, shards=shards, complete=True)
            remove_temporaries(self.path)
            write_manifest(self.path, manifest)
            note(self.path, "finalize", entries=len(manifest))
        self.manifest = manifest

    def _tidy(self) -> None:
        """Remove what is only needed while building; a crash before it changes nothing."""
        if not any((self.path / name).exists() for name in (JOURNAL, LOCKS)):
            return
        try:
            (self.path / JOURNAL).unlink(missing_ok=True)
            shutil.rmtree(self.path / LOCKS, ignore_errors=True)
            sync_directory(self.path)
        except OSError as error:
            raise not_writable(self.path, error) from error

    def _finished(self, numbers: Sequence[int] | None = None) -> dict[int, ShardRecord]:
        """Records of finished ranges, of all or of ``numbers`` only."""
        ranges = self.manifest.ranges
        finished = {}
        for line in self._journal.read():
            try:
                record = ShardRecord.from_dict(line, self.manifest.info)
            except InputError:
                continue  # not a line of ours, or torn in a way that is still JSON
            if record.number < len(ranges) and record.rows == ranges[record.number].rows:
                finished[record.number] = record
        return {
            number: record
            for number, record in finished.items()
            if (numbers is None or number in numbers)
            and not any(size_problem(self.path / name, size) for name, size in record.sizes.items())
        }

    def _remove_leftovers(self, number: int) -> None:
        for name in self.manifest.info.shard_files(number):
            for leftover in self.path.glob(f"{name}.*{TEMPORARY}"):
                leftover.unlink(missing_ok=True)

    def _check_number(self, number: int) -> None:
        check(
            0 <= number < len(self.manifest.ranges),
            f"a range must lie between 0 and {len(self.manifest.ranges) - 1}, got {number}",
        )
