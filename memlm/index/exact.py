"""Exact search in blocks: one matrix product per block of keys, and only what can matter kept.

    -|q - x|^2 = 2 q.x - |x|^2 - |q|^2        (norms of keys are measured once)

Scores exist for one block of queries times one block of keys at a time, so memory does not grow
with the store. After the first block every query has a k-th best score; of later blocks only the
entries above it are picked out, collected, and merged when there are enough of them. That makes the
search cost little more than its matrix products. Later keys have higher ids, so an equal score
never displaces an earlier one: the answer is ordered by (score descending, id ascending), exactly,
also at the k boundary.

Keys keep their stored dtype and are cast per block; sums are float32, or float64 for float64
queries. The expansion above loses digits when norms are large against distances: about 1e-7 times
(|q|^2 + |x|^2) in float32. `KnnMemory(recompute=True)` or float64 queries avoid that.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.core.config import check
from memlm.core.types import SearchResult
from memlm.index.keys import KeySource, as_keys
from memlm.index.metrics import METRICS, check_choice, check_k, key_norms, prepare_queries
from memlm.index.record import IndexRecord
from memlm.ops.topk import ordered_topk

# Numbers in a block of keys: the cast block and its scores stay in the processor's cache, and a
# GPU has enough to do.
_BLOCK_NUMBERS = {"cpu": 1 << 21, "cuda": 1 << 27}
_QUERIES = {"cpu": 256, "cuda": 1024}
_EDGE = 64


class ExactIndex:
    """Brute force over all keys, on the device of the keys.

    Args:
        keys: a tensor ``(entries, dim)``, searched where it is, or a source of blocks, read anew
            for every search (for stores larger than memory).
        metric: "l2", "ip" or "cosine".
        store_fingerprint: of the store the keys belong to, kept when saved.

    Raises:
        InputError: for an unknown metric, no keys, non-finite keys, or zero keys under "cosine".
    """

    def __init__(
        self, keys: Tensor | KeySource, metric: str = "l2", *, store_fingerprint: str = ""
    ):
        check_choice("metric", metric, METRICS)
        self._keys = as_keys(keys)
        self.metric = metric
        self.dim = self._keys.dim
        self.store_fingerprint = store_fingerprint
        self._device = keys.device if isinstance(keys, Tensor) else torch.device("cpu")
        kind = "cpu" if self._device.type == "cpu" else "cuda"
        rows = min(max(_BLOCK_NUMBERS[kind] // self.dim, 1024), len(self._keys))
        self._rows = -(-rows // _EDGE) * _EDGE
        self._queries = _QUERIES[kind]
        self._norms = self._measure()

    def __len__(self) -> int:
        return len(self._keys)

    @torch.no_grad()
    def search(self, queries: Tensor, k: int) -> SearchResult:
        """The exact k nearest keys, ties by lower id.

        Args:
            queries: ``(queries, dim)``; float64 is computed in float64, all else in float32.
            k: neighbours; columns beyond the number of keys hold score -inf and id -1.

        Raises:
            InputError: for k below 1 or queries of another width or non-finite.
        """
        check_k(k)
        device = queries.device
        wanted = prepare_queries(queries, self.dim, self.metric).to(self._device)
        chunks = [_Chunk(chunk, k) for chunk in wanted.split(self._queries)]
        dtype = wanted.dtype
        buffer = torch.empty(0, dtype=dtype)
        scores = wanted.new_empty(min(self._queries, len(wanted)), self._rows)
        with torch.autocast(self._device.type, enabled=False):
            for start, block in self._keys.blocks(self._rows):
                rows = len(block)
                if rows < self._rows or block.dtype != dtype or block.device != self._device:
                    # One buffer for all blocks: fresh pages would cost more than the cast. And one
                    # shape for all products: equal keys get equal scores, wherever they lie.
                    if len(buffer) == 0:
                        buffer = wanted.new_zeros(self._rows, self.dim)
                    buffer[:rows].copy_(block)
                    block = buffer
                norms = self._block_norms(start, rows, block)
                for chunk in chunks:
                    out = self._score(chunk.queries, block, norms, scores[: len(chunk.queries)])
                    chunk.add(out[:, :rows], start)
        if not chunks:
            empty = torch.empty(0, k, dtype=dtype, device=device)
            return SearchResult(empty, empty.long())
        found = [chunk.finish() for chunk in chunks]
        return SearchResult(
            torch.cat([part[0] for part in found]).to(device),
            torch.cat([part[1] for part in found]).to(device),
        )

    def describe(self) -> dict[str, Any]:
        """Kind, metric and size; the recall is 1 by construction."""
        return {**self._record().summary(), "recall": {"value": 1.0, "source": "exact search"}}

    def save(self, directory: Path) -> None:
        """Write ``index.json``; the keys stay in the store and must be given back on loading."""
        self._record().write(Path(directory), None)

    def _record(self) -> IndexRecord:
        return IndexRecord(
            engine="exact",
            metric=self.metric,
            dim=self.dim,
            entries=len(self),
            store_fingerprint=self.store_fingerprint,
        )

    def _measure(self) -> Tensor:
        """``(entries,)`` float32: squared norms for "l2", one over the norm for "cosine"."""
        measured = torch.empty(len(self._keys), dtype=torch.float32, device=self._device)
        seen = 0
        for start, block in self._keys.blocks(self._rows):
            check(
                start == seen and block.shape[1:] == (self.dim,) and len(block) <= self._rows,
                f"blocks of keys must follow each other with shape (up to {self._rows}, "
                f"{self.dim}), got {tuple(block.shape)} at key {start} after {seen} keys",
            )
            norms = key_norms(block.to(self._device), self.metric, start)
            seen += len(block)
            measured[start:seen] = norms.reciprocal() if self.metric == "cosine" else norms.square()
        check(
            seen == len(self._keys),
            f"the source of keys must yield all {len(self._keys)} keys, got {seen}",
        )
        return measured

    def _block_norms(self, start: int, rows: int, block: Tensor) -> Tensor:
        if block.dtype != torch.float64:
            norms = self._norms[start : start + rows]
            return torch.nn.functional.pad(norms, (0, len(block) - rows))
        squares = block.square().sum(-1)
        return squares.rsqrt() if self.metric == "cosine" else squares

    def _score(self, queries: Tensor, block: Tensor, norms: Tensor, out: Tensor) -> Tensor:
        """Scores ``(queries, rows)`` of one block of keys, written to ``out``."""
        if self.metric == "ip":
            return torch.mm(queries, block.T, out=out)
        if self.metric == "cosine":
            return torch.mm(queries, block.T, out=out).mul_(norms).clamp_(-1, 1)
        torch.addmm(norms, queries, block.T, beta=-1, alpha=2, out=out)
        return out.sub_(queries.square().sum(-1, keepdim=True)).clamp_(max=0)


class _Chunk:
    """The k best so far of some queries, and better ones that wait for the next merge."""

    def __init__(self, queries: Tensor, k: int):
        self.queries = queries
        self.k = k
        self._scores = queries.new_empty(len(queries), 0)
        self._ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._count = 0

    def add(self, scores: Tensor, start: int) -> None:
        """Take in the scores ``(queries, rows)`` of the keys from ``start`` on."""
        if self._scores.shape[1] < self.k:
            best, columns = ordered_topk(scores, self.k)
            self._join(best, columns + start)
            return
        row, column = (scores > self._scores[:, -1:]).nonzero(as_tuple=True)
        if len(row):
            self._waiting.append((row, column + start, scores[row, column]))
            self._count += len(row)
        if self._count >= self._scores.numel():
            self._merge()

    def finish(self) -> tuple[Tensor, Tensor]:
        """Scores and ids ``(queries, k)``, filled up with (-inf, -1)."""
        if self._waiting:
            self._merge()
        missing = (0, self.k - self._scores.shape[1])
        return (
            torch.nn.functional.pad(self._scores, missing, value=-torch.inf),
            torch.nn.functional.pad(self._ids, missing, value=-1),
        )

    def _merge(self) -> None:
        row, ids, scores = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._count = [], 0
        order = torch.argsort(row, stable=True)
        row, ids, scores = row[order], ids[order], scores[order]
        counts = torch.bincount(row, minlength=len(self._scores))
        column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        shape = (len(self._scores), int(counts.max()))
        padded = scores.new_full(shape, -torch.inf)
        padded_ids = ids.new_full(shape, -1)
        padded[row, column], padded_ids[row, column] = scores, ids
        self._join(padded, padded_ids)

    def _join(self, scores: Tensor, ids: Tensor) -> None:
        scores = torch.cat([self._scores, scores], dim=1)
        self._scores, self._ids = ordered_topk(
            scores, self.k, torch.cat([self._ids, ids.expand(len(scores), -1)], dim=1)
        )
