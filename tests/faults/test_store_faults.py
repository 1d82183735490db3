"""Several workers on one store: side by side, killed in numbers; and every byte of it counts.

What single processes and files can suffer is in `test_every_builder`.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from memlm.store.manifest import Identity, PlannedRange, StoreInfo
from memlm.store.reader import Datastore
from memlm.store.verify import verify
from memlm.store.writer import StoreWriter

ROWS = (3, 5, 2)
DIM = 4
IDENTITY = Identity("tiny", "m", "t", "final", DIM, "float16", corpus_hash="c", threads=1)
RANGES = [PlannedRange(number, number + 1, rows) for number, rows in enumerate(ROWS)]
INFO = StoreInfo(documents=1, vocab_size=9)


def entries(number):
    rows = ROWS[number]
    generator = torch.Generator().manual_seed(number)
    keys = torch.randn(rows, DIM, generator=generator)
    return (
        keys,
        torch.full((rows,), number),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
    )


def build(path, pause=0.0) -> Datastore:
    """What a worker does: claim what is pending until nothing is, then finalize."""
    writer = StoreWriter.open(path, IDENTITY, RANGES, info=INFO)
    while pending := writer.pending():
        for number in pending:
            with writer.claim(number) as mine:
                if mine:
                    writer.write(number, *entries(number))
            time.sleep(pause)
    return writer.finalize()


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "build-log.jsonl"
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "store"
    build(path)
    return contents(path)


def work(path, seed):
    build(path, pause=0.001 * (seed % 3))


@pytest.mark.faults
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("seed", range(20))
def test_many_workers_and_many_kills(seed, reference, tmp_path):
    random_numbers = random.Random(seed)
    context = multiprocessing.get_context("fork")
    path = tmp_path / "store"
    for _ in range(6):
        workers = [context.Process(target=work, args=(path, number)) for number in range(3)]
        for worker in workers:
            worker.start()
        time.sleep(random_numbers.uniform(0, 0.05))
        for worker in random_numbers.sample(workers, 2):
            if worker.pid and worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)
        for worker in workers:
            worker.join(60)
            assert worker.exitcode in (0, -signal.SIGKILL)
    build(path)
    assert contents(path) == reference


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_workers_side_by_side_write_the_same_store(reference, tmp_path):
    context = multiprocessing.get_context("fork")
    path = tmp_path / "store"
    workers = [context.Process(target=work, args=(path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    build(path)
    assert contents(path) == reference


# --- files that rot


@pytest.mark.parametrize(
    "name", [f"{kind}-00001.safetensors" for kind in ("keys", "values", "documents")]
)
def test_every_flipped_byte_is_found(name, tmp_path):
    path = tmp_path / "store"
    build(path)
    data = (path / name).read_bytes()
    for place in range(0, len(data), 7):
        broken = bytearray(data)
        broken[place] ^= 0x10
        (path / name).write_bytes(broken)
        report = verify(path, "full", progress=False)
        assert not report.ok
        assert all(name in problem for problem in report.problems)
    (path / name).write_bytes(data)
    assert verify(path, "full").ok
