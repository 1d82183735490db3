"""Verifying a datastore: is every file still what was written?

Problems are collected, not raised, so one damaged file does not hide another.

* quick: the manifest, and presence, size and header of every file. Seconds for any size.
* full: also the checksum of every byte.

Recomputing a sample of keys with the model needs a model and lives with the extraction.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from memlm.core.config import check
from memlm.core.errors import StoreError
from memlm.core.files import TEMPORARY, checksum, read_json
from memlm.core.progress import bar
from memlm.store.codec import CODEC_RECORD, Codec
from memlm.store.manifest import JOURNAL, Manifest, ShardRecord, read_manifest
from memlm.store.reader import TORCH_DTYPES, read_tensor, size_problem

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class VerifyReport:
    """What was looked at and what is wrong.

    Attributes:
        path: the directory.
        level: ``"quick"`` or ``"full"``.
        checked: what was looked at, one line each.
        problems: what is wrong, one sentence each; empty for a sound store.
        notes: what is odd but harmless (leftovers of killed writers).
    """

    path: Path
    level: Level
    checked: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def joined(self, other: "VerifyReport") -> "VerifyReport":
        """This report followed by another one on the same store, e.g. of recomputed keys."""
        return replace(
            self,
            checked=self.checked + other.checked,
            problems=self.problems + other.problems,
            notes=self.notes + other.notes,
        )

    def describe(self) -> str:
        """The report as text: the verdict, what was checked, then problems and notes."""
        count = len(self.problems)
        verdict = "sound" if self.ok else f"{count} problem{'s' if count > 1 else ''}"
        return "\n".join(
            [
                f"{self.path}: {verdict}",
                *(f"  checked  {line}" for line in self.checked),
                *(f"  PROBLEM  {line}" for line in self.problems),
                *(f"  note     {line}" for line in self.notes),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "level": self.level,
            "ok": self.ok,
            "checked": list(self.checked),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def verify(path: str | Path, level: Level = "quick", *, progress: bool = True) -> VerifyReport:
    """Check the datastore in the directory ``path``.

    Args:
        path: the directory.
        level: ``"quick"`` or ``"full"``.
        progress: show a bar when it takes over two seconds.

    Raises:
        InputError: for another level.
    """
    check(level in ("quick", "full"), f"level must be 'quick' or 'full', got {level!r}")
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except StoreError as error:
        return VerifyReport(path, level, ("the manifest",), (str(error),), _leftovers(path))
    if not manifest.complete:
        problem = (
            f"the datastore {path} is still being built; run the command that builds it again to "
            "finish it"
        )
        return VerifyReport(path, level, ("the manifest",), (problem,), _leftovers(path))

    problems = _codec_problems(path, manifest)
    total = sum(size for shard in manifest.shards for size in shard.sizes.values())
    with bar(total, label="verify", unit="B", quiet=not progress) as shown:
        for shard in manifest.shards:
            problems += _shard_problems(path, manifest, shard, level)
            shown.update(sum(shard.sizes.values()))
    files = sum(len(shard.sizes) for shard in manifest.shards)
    checked = [
        "the manifest and its fingerprint",
        f"presence, size and header of {files} files",
        f"the counts of {len(manifest)} entries in {len(manifest.shards)} shards",
    ]
    if level == "full":
        checked.append(f"checksums of {total} bytes")
    return VerifyReport(path, level, tuple(checked), tuple(problems), _leftovers(path))


def _shard_problems(path: Path, manifest: Manifest, shard: ShardRecord, level: Level) -> list[str]:
    problems = []
    identity = manifest.identity
    layout = {
        "keys": {"keys": ((shard.rows, identity.dim), TORCH_DTYPES[identity.dtype])},
        "codes": {"codes": ((shard.rows, manifest.info.code_size or 0), torch.uint8)},
        "values": {"values": ((shard.rows,), torch.int32)},
        "documents": {
            "document": ((shard.rows,), torch.int32),
            "position": ((shard.rows,), torch.int32),
        },
        "merged": {
            "weight": ((shard.rows,), torch.int32),
            "successor": ((shard.rows,), torch.int32),
        },
    }
    for name, size in shard.sizes.items():
        file = path / name
        if problem := size_problem(file, size):
            problems.append(problem)
            continue
        try:
            for tensor, (shape, dtype) in layout[name.partition("-")[0]].items():
                read_tensor(file, tensor, shape, dtype)
            if level == "full" and (found := checksum(file)) != shard.checksums[name]:
                problems.append(
                    f"{file} was altered: its checksum must be {shard.checksums[name]} but is "
                    f"{found}; restore it from a copy or rebuild the store"
                )
        except StoreError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{file} cannot be read ({error.strerror or error}); check the disk")
    return problems


def _codec_problems(path: Path, manifest: Manifest) -> list[str]:
    if manifest.identity.codec is None:
        return []
    try:
        Codec.read(path, manifest.identity.codec)
        if read_json(path / CODEC_RECORD).get("checksum") != manifest.identity.codec:
            return [f"{path / CODEC_RECORD} must describe the codec of this store; restore it"]
    except StoreError as error:
        return [str(error)]
    return []


def _leftovers(path: Path) -> tuple[str, ...]:
    if not path.is_dir():
        return ()
    names = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name.endswith(TEMPORARY) or entry.name == JOURNAL
    )
    return tuple(f"{path / name} is left over from building and is not read" for name in names)
