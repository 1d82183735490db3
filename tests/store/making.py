"""Small stores to test on."""

from pathlib import Path

import torch

from memlm.store.manifest import Identity, PlannedRange, StoreInfo
from memlm.store.writer import StoreWriter

ROWS = (5, 1, 7)
DIM = 4
VOCAB = 50


def identity(**changes) -> Identity:
    values = {
        "model": "tiny",
        "model_hash": "m",
        "tokenizer_hash": "t",
        "tap": "final",
        "dim": DIM,
        "dtype": "float32",
        "corpus_hash": "c",
        "windows": {"kind": "SlidingWindows", "length": 8},
        "batch_tokens": 64,
        "threads": 1,
    }
    return Identity(**{**values, **changes})


def ranges(rows=ROWS) -> list[PlannedRange]:
    return [PlannedRange(number, number + 1, count) for number, count in enumerate(rows)]


def info(**changes) -> StoreInfo:
    return StoreInfo(**{"documents": 3, "vocab_size": VOCAB, **changes})


def entries(number, rows=None, dtype=torch.float32):
    """Keys, values, documents and positions of one range, always the same."""
    rows = ROWS[number] if rows is None else rows
    generator = torch.Generator().manual_seed(number)
    keys = torch.randn(rows, DIM, generator=generator, dtype=torch.float32).to(dtype)
    values = torch.randint(0, VOCAB, (rows,), generator=generator)
    return keys, values, torch.full((rows,), number), torch.arange(rows)


def open_writer(path, **changes) -> StoreWriter:
    return StoreWriter.open(path, identity(**changes), ranges(), info=info())


def build(path, numbers=None, **changes):
    """Do all pending ranges (among ``numbers``) the way a worker does."""
    writer = open_writer(path, **changes)
    for number in range(len(ROWS)) if numbers is None else numbers:
        if number in writer.pending():
            with writer.claim(number) as mine:
                if mine:
                    writer.write(number, *entries(number))
    return writer


def contents(path: Path) -> dict[str, bytes]:
    """What a store is: every file but the build log."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "build-log.jsonl"
    }
