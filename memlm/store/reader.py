"""Reading a datastore: keys stay on disk until they are asked for.

Entry i of a store is the i-th predicted token of its plan: a key ``(dim,)``, a value (the token
that came next) and, where known, the document and the token's position in it. Keys are memory-
mapped shard by shard, so opening a store of any size is instant, ``gather`` touches the pages of
the keys it returns, and only ``load_keys`` puts all of them into memory.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.core.files import read_json
from memlm.store.codec import Codec
from memlm.store.manifest import Manifest, read_manifest
from memlm.store.residency import KEY_RESIDENCIES, KeyResidency
from memlm.store.successors import next_entries

DELETED = "deleted.json"
_DELETED_VERSION = 1
TORCH_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class Datastore:
    """A complete datastore, opened for reading; several processes may read one at once.

    Attributes:
        path: its directory.
        manifest: what it is.
        deleted: numbers of its deleted documents, ascending.
        residency: of the keys, "disk" or "ram".
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        deleted: tuple[int, ...] = (),
        keys: KeyResidency = "disk",
    ):
        self.path = path
        self.residency = keys
        self.manifest = manifest
        self.deleted = deleted
        rows = [shard.rows for shard in manifest.shards]
        self._starts = torch.tensor([0, *rows], dtype=torch.int64).cumsum(0)
        self._mapped: list[Tensor | None] = [None] * len(rows)

    @classmethod
    def open(cls, path: str | Path, *, keys: KeyResidency = "disk") -> Self:
        """Open the datastore in the directory ``path``; reads the manifest and file sizes only.

        Args:
            path: its directory.
            keys: "disk": memory-mapped; "ram": each shard is read into memory when a key of it is
                first asked for, and stays.

        Raises:
            InputError: for another place for keys.
            StoreError: if it is still being built or was written by a newer memlm.
            CorruptStoreError: if the manifest or a file is missing, truncated or altered in size.
        """
        check(
            keys in KEY_RESIDENCIES,
            f"keys must be on 'disk' or in 'ram', got {keys!r}",
        )
        path = Path(path)
        manifest = read_manifest(path)
        if not manifest.complete:
            raise StoreError(
                f"the datastore {path} is still being built; run the command that builds it again "
                "to finish it"
            )
        for shard in manifest.shards:
            for name, size in shard.sizes.items():
                if problem := size_problem(path / name, size):
                    raise CorruptStoreError(problem)
        return cls(path, manifest, read_deleted(path), keys)

    def __len__(self) -> int:
        return len(self.manifest)

    def __repr__(self) -> str:
        return f"Datastore({str(self.path)!r}, entries={len(self)}, dim={self.dim}, {self.dtype})"

    @property
    def dim(self) -> int:
        """Length of a key."""
        return self.manifest.identity.dim

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the keys."""
        return TORCH_DTYPES[self.manifest.identity.dtype]

    @property
    def metric(self) -> str:
        """How the keys are meant to be compared: ``"l2"``, ``"ip"`` or ``"cosine"``."""
        return self.manifest.info.metric

    @property
    def fingerprint(self) -> str:
        """Of the contents; indexes and saved models refer to the store by it."""
        return self.manifest.fingerprint

    @cached_property
    def values(self) -> Tensor:
        """``(entries,)`` int32, the token that followed each key; loaded at first use."""
        return self._column("values", "values")

    @cached_property
    def documents(self) -> Tensor | None:
        """``(entries,)`` int32 document of each predicted token, None if the store has none."""
        return self._column("documents", "document") if self.manifest.info.places else None

    @cached_property
    def positions(self) -> Tensor | None:
        """``(entries,)`` int32 place of the predicted token in its document, or None."""
        return self._column("documents", "position") if self.manifest.info.places else None

    @cached_property
    def dead(self) -> Tensor | None:
        """``(entries,)`` bool, whether an entry's document is deleted; None if none is."""
        if not self.deleted or self.documents is None:
            return None
        return torch.isin(self.documents, torch.tensor(self.deleted, dtype=torch.int32))

    @cached_property
    def weights(self) -> Tensor | None:
        """``(entries,)`` int32, how many entries each stands for in a pruned store, else None."""
        return self._column("merged", "weight") if self.manifest.info.merged else None

    @cached_property
    def successors(self) -> Tensor:
        """``(entries,)`` integers, the entry after each in its document, -1 where there is none.

        In a pruned store it is the one that stands for the follower.
        """
        if self.manifest.info.merged:
            return self._column("merged", "successor")
        return next_entries(len(self), self.documents, self.positions)

    @cached_property
    def codec(self) -> Codec | None:
        """What makes keys of the codes; None in a store of whole keys.

        Raises:
            CorruptStoreError: if it is missing or was changed.
        """
        fingerprint = self.manifest.identity.codec
        return None if fingerprint is None else Codec.read(self.path, fingerprint)

    def gather(self, ids: Tensor) -> Tensor:
        """The keys of some entries; the pages of the others are not touched.

        Args:
            ids: int64 entry numbers, any shape, on any device.

        Returns:
            ``(*ids.shape, dim)`` in the store's dtype on the device of ``ids``.

        Raises:
            InputError: if an id is not in the store.
        """
        flat = ids.detach().to("cpu", torch.int64).reshape(-1)
        if flat.numel() == 0:
            return torch.empty((*ids.shape, self.dim), dtype=self.dtype, device=ids.device)
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= len(self):
            raise InputError(
                f"entry ids must lie between 0 and {len(self) - 1}, got "
                f"{low if low < 0 else high}; drop the masked ids (-1) of a search first"
            )
        if len(self._mapped) == 1:
            keys = self._decoded(self._keys(0).index_select(0, flat))
        else:
            keys = self._gather_over_shards(flat)
        return keys.reshape(*ids.shape, self.dim).to(ids.device)

    def _gather_over_shards(self, flat: Tensor) -> Tensor:
        # Ascending ids read each shard once, front to back, which is what a disk likes.
        ordered, order = flat.sort()
        edges = torch.searchsorted(ordered, self._starts)
        keys = torch.empty((len(flat), self.dim), dtype=self.dtype)
        for shard in torch.nonzero(edges.diff()).reshape(-1).tolist():
            part = slice(int(edges[shard]), int(edges[shard + 1]))
            local = ordered[part] - self._starts[shard]
            keys[order[part]] = self._decoded(self._keys(shard).index_select(0, local))
        return keys

    def blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """All keys in order, a block at a time.

        Args:
            rows: most keys in a block; a block also ends where a shard ends.

        Yields:
            The number of the first entry and ``(rows, dim)`` keys: a view of the file, so copy
            what is to be changed or kept.

        Raises:
            InputError: if ``rows`` is below 1.
        """
        check(rows >= 1, f"a block must have at least 1 row, got {rows}")
        return self._blocks(rows)

    def _blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        for start, keys in self.stored_blocks(rows):
            yield start, self._decoded(keys)

    def stored_blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """As `blocks`, as they lie on disk: keys, or in a store of codes ``(rows, code_size)``."""
        for shard, record in enumerate(self.manifest.shards):
            keys = self._keys(shard)
            for at in range(0, record.rows, rows):
                yield int(self._starts[shard]) + at, keys[at : at + rows]

    def _decoded(self, stored: Tensor) -> Tensor:
        return stored if self.codec is None else self.codec.decode(stored).to(self.dtype)

    def load_keys(
        self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> Tensor:
        """All keys as one tensor in memory.

        Args:
            dtype: number format to load as; None: the store's.
            device: where to.

        Returns:
            ``(entries, dim)``.
        """
        keys = torch.empty((len(self), self.dim), dtype=dtype or self.dtype, device=device)
        for start, block in self.blocks(1 << 16):
            keys[start : start + len(block)] = block.to(device)
        return keys

    def describe(self) -> dict[str, Any]:
        """Entries, key and fingerprint as plain JSON values, to print with results."""
        identity = self.manifest.identity
        return {
            "store": str(self.path),
            "entries": len(self),
            "deleted_documents": len(self.deleted),
            "dim": self.dim,
            "dtype": identity.dtype,
            "code_size": self.manifest.info.code_size,
            "keys": self.residency if self.manifest.info.code_size is None else "absent",
            "model": identity.model,
            "tap": identity.tap,
            "fingerprint": self.fingerprint,
        }

    def _keys(self, shard: int) -> Tensor:
        mapped = self._mapped[shard]
        if mapped is None:
            rows, info = self.manifest.shards[shard].rows, self.manifest.info
            name = self.path / info.shard_files(shard)[0]
            if info.code_size is None:
                mapped = read_tensor(name, "keys", (rows, self.dim), self.dtype)
            else:
                mapped = read_tensor(name, "codes", (rows, info.code_size), torch.uint8)
            mapped = mapped.clone() if self.residency == "ram" else mapped
            self._mapped[shard] = mapped
        return mapped

    def _column(self, kind: str, name: str) -> Tensor:
        column = torch.empty(len(self), dtype=torch.int32)
        for shard, record in enumerate(self.manifest.shards):
            file = self.path / f"{kind}-{shard:05d}.safetensors"
            start = int(self._starts[shard])
            column[start : start + record.rows] = read_tensor(
                file, name, (record.rows,), torch.int32
            )
        return column


def read_deleted(path: Path) -> tuple[int, ...]:
    """Numbers of the deleted documents of the store in the directory ``path``, ascending.

    Raises:
        CorruptStoreError: if the list cannot be read.
    """
    file = path / DELETED
    if not file.exists():
        return ()
    try:
        values = read_json(file)
        if values["format_version"] > _DELETED_VERSION:
            raise StoreError(
                f"{file} has format version {values['format_version']}, newer than this memlm "
                f"reads ({_DELETED_VERSION}); upgrade memlm"
            )
        return tuple(int(document) for document in values["documents"])
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CorruptStoreError(
            f"{file} must list the deleted documents but cannot be read ({error!r}); restore it "
            "from a copy"
        ) from error


def size_problem(path: Path, size: int) -> str | None:
    """What is wrong with the size of a file of a store, None if nothing is."""
    try:
        found = path.stat().st_size
    except OSError:
        return f"{path} must exist but does not; restore it from a copy or rebuild the store"
    if found != size:
        return (
            f"{path} must have {size} bytes but has {found}; restore it from a copy or rebuild "
            "the store"
        )
    return None


def read_tensor(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One tensor of a safetensors file, memory-mapped.

    Raises:
        CorruptStoreError: if the file does not hold that tensor in that shape and dtype.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CorruptStoreError(
            f"{path} must be a safetensors file with the tensor '{name}' but cannot be read "
            f"({error}); restore it from a copy or rebuild the store"
        ) from error
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CorruptStoreError(
            f"'{name}' in {path} must be {dtype} of shape {shape}, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}; restore it from a copy or rebuild the store"
        )
    return tensor
