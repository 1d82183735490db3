"""``index.json``: what was built, how, from which store, and how much of the truth it finds.

An approximate index without its measured recall would pass for an exact one, and an index beside
the wrong store would answer with the wrong tokens; so both are written down and checked.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memlm.core.config import Config
from memlm.core.errors import CorruptStoreError, FingerprintError, InputError
from memlm.core.files import checksum, make_folder, read_json, write_json

RECORD_FILE = "index.json"
FAISS_FILE = "index.faiss"


@dataclass(frozen=True)
class IndexRecord(Config):
    """The content of ``index.json``.

    Attributes:
        engine: "exact" (torch, no file of its own) or "faiss".
        metric: "l2", "ip" or "cosine".
        dim: width of keys.
        entries: number of keys.
        store_fingerprint: of the store, empty if it was never told.
        factory: FAISS factory string, empty if unknown or exact.
        nprobe: inverted lists visited per query, None without lists.
        train_size: keys the index was trained on.
        seed: of the training sample and the clustering.
        recall: ``{"k", "queries", "value", "source"}`` as measured, None if it was not.
        faiss: version that built the file.
        file: name of the FAISS file beside the record, empty if exact.
        checksum: of that file.
    """

    engine: str
    metric: str
    dim: int
    entries: int
    store_fingerprint: str = ""
    factory: str = ""
    nprobe: int | None = None
    train_size: int = 0
    seed: int = 0
    recall: dict[str, Any] | None = None
    faiss: str = ""
    file: str = ""
    checksum: str = ""

    def summary(self) -> dict[str, Any]:
        """What to print with results: no paths and no checksums."""
        values = {"engine": self.engine, "metric": self.metric, "entries": self.entries}
        if self.engine == "faiss":
            values |= {
                "factory": self.factory,
                "nprobe": self.nprobe,
                "train_size": self.train_size,
                "seed": self.seed,
                "recall": self.recall,
                "faiss": self.faiss,
            }
        return values

    def write(self, directory: Path, file: Path | None) -> None:
        """Write ``index.json`` last, after the file it vouches for.

        Args:
            directory: made if missing.
            file: the finished FAISS file inside it, None for exact search.
        """
        make_folder(directory)
        record = self
        if file is not None:
            record = replace(self, file=file.name, checksum=checksum(file))
        write_json(directory / RECORD_FILE, record.to_dict())

    @classmethod
    def read(cls, directory: Path, name: str = RECORD_FILE) -> "IndexRecord":
        """The record ``name`` in ``directory``.

        Raises:
            CorruptStoreError: if it is missing, does not parse, or lacks or adds fields.
        """
        path = directory / name
        values = read_json(path)
        try:
            record = cls.from_dict(values)
        except (InputError, TypeError) as error:
            raise CorruptStoreError(
                f"{path} must describe an index but does not ({error}); build the index again"
            ) from error
        if record.file != Path(record.file).name:
            raise CorruptStoreError(
                f"{path} must name a file beside it, got '{record.file}'; build the index again"
            )
        return record

    def check_store(self, fingerprint: str) -> None:
        """Raise FingerprintError if both fingerprints are known and differ."""
        if self.store_fingerprint and fingerprint and self.store_fingerprint != fingerprint:
            raise FingerprintError(
                f"the index was built from store {self.store_fingerprint} but is opened with store "
                f"{fingerprint}; build an index for this store or open the one it belongs to"
            )
