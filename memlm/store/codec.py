"""Keys as codes: a datastore that never holds a whole key.

    code(key) = (the nearest list, the product code nearest to what is left of the key)
                                             (IVF-PQ: Jegou et al. 2011; OPQ: Ge et al. 2013)

``codec.faiss`` is an empty index that was trained on a sample; ``codes-00000.safetensors`` hold one
row of bytes per entry. A store of codes offers the keys that its codes stand for, so whatever reads
keys reads it, and the index of its codes is the very index that a store of whole keys would get
with the same training. This file knows how codes are made and read; who trains is `memlm.extract`.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.errors import CorruptStoreError
from memlm.core.faiss_files import read_faiss
from memlm.core.files import checksum

CODEC = "codec.faiss"
CODEC_RECORD = "codec.json"


class Codec:
    """A trained index that makes codes of keys, and keys of codes.

    Args:
        index: a trained FAISS index that has standalone codes.
        fingerprint: checksum of its file.

    Attributes:
        dim: width of a key.
        code_size: bytes of a code.
    """

    def __init__(self, index: Any, fingerprint: str):
        self.index, self.fingerprint = index, fingerprint
        self.dim: int = index.d
        self.code_size: int = index.sa_code_size()

    @classmethod
    def read(cls, folder: Path, fingerprint: str | None = None) -> Self:
        """The codec of the store in ``folder``.

        Raises:
            CorruptStoreError: if it is missing, or not the one with this fingerprint.
        """
        found = checksum(folder / CODEC)
        if fingerprint not in (None, found):
            raise CorruptStoreError(
                f"{folder / CODEC} must have checksum {fingerprint} but has {found}, and codes "
                "mean nothing without it; restore it from a copy or rebuild the store"
            )
        return cls(read_faiss(folder / CODEC), found)

    def encode(self, keys: Tensor) -> Tensor:
        """Codes ``(rows, code_size)`` uint8 of keys ``(rows, dim)``, of length one for cosines."""
        check(
            keys.shape[-1] == self.dim,
            f"keys must have the codec's {self.dim} dimensions, got {keys.shape[-1]}",
        )
        return torch.from_numpy(self.index.sa_encode(keys.float().cpu().contiguous().numpy()))

    def decode(self, codes: Tensor) -> Tensor:
        """The keys ``(rows, dim)`` float32 that codes ``(rows, code_size)`` stand for."""
        if len(codes) == 0:
            return torch.empty(0, self.dim)
        return torch.from_numpy(self.index.sa_decode(codes.contiguous().numpy()))
