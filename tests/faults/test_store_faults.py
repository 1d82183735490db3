"""Faults of the store: any call to the disk may fail, any worker may die, any file may rot.

The law: whatever happened before, running the same build again gives the bytes of an undisturbed
build, or the damage is named. Nothing half-written is ever read.
"""

import builtins
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from memlm.core.errors import StoreError
from memlm.store.manifest import MANIFEST, Identity, PlannedRange, StoreInfo, read_manifest
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


class Failing:
    """Lets calls through until the n-th one below ``path``, which fails; counts them."""

    def __init__(self, original, path, number, error=None):
        self.original, self.path, self.number = original, str(path), number
        self.error = error or OSError(28, "No space left on device")
        self.calls = 0

    def ours(self, target) -> bool:
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return True
        return str(target).startswith(self.path)

    def __call__(self, target, *rest, **options):
        if not self.ours(target):
            return self.original(target, *rest, **options)
        self.calls += 1
        if self.calls == self.number + 1:
            raise self.error
        return self.original(target, *rest, **options)


CALLS = {
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "os.open": (os, "open"),
    "write": (os, "write"),
    "open": (builtins, "open"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
}


def calls_of(name, path) -> int:
    """How often an undisturbed build makes the call."""
    with pytest.MonkeyPatch.context() as patch:
        place, attribute = CALLS[name]
        counting = Failing(getattr(place, attribute), path, -1)
        patch.setattr(place, attribute, counting)
        build(path)
    return counting.calls


@pytest.mark.parametrize("name", CALLS)
def test_every_call_to_the_disk_may_fail_once(name, reference, tmp_path, monkeypatch):
    count = calls_of(name, tmp_path / "count")
    assert count >= (1 if name in ("mkdir", "unlink") else len(ROWS))
    place, attribute = CALLS[name]
    original = getattr(place, attribute)
    for number in range(count):
        path = tmp_path / f"store-{number}"
        failing = Failing(original, path, number)
        monkeypatch.setattr(place, attribute, failing)
        message = None
        try:
            build(path)
        except StoreError as error:
            message = str(error)
        assert message is None or "run the same command" in message
        assert message is None or "No space left on device" in message
        monkeypatch.setattr(place, attribute, original)
        assert failing.calls > number, "the call was not reached"
        if (path / MANIFEST).exists():
            read_manifest(path)  # whole, or absent
        build(path)
        assert contents(path) == reference, f"after call {number} of {name} failed"


def test_a_full_disk_leaves_no_half_file_behind(tmp_path, monkeypatch):
    original, path = os.fsync, tmp_path / "store"
    StoreWriter.open(path, IDENTITY, RANGES, info=INFO)
    monkeypatch.setattr(os, "fsync", Failing(original, path, 2))
    with pytest.raises(StoreError):
        build(path)
    assert not list(path.rglob("*.tmp"))


# --- workers that die


class Killing(Failing):
    """The process dies at the n-th call, as by a power cut: no handler runs."""

    def __call__(self, target, *rest, **options):
        if self.ours(target):
            self.calls += 1
            if self.calls == self.number + 1:
                os._exit(9)
        return self.original(target, *rest, **options)


def build_and_die(path, name, number, after):
    place, attribute = CALLS[name]
    original = getattr(place, attribute)
    killing = Killing(original, path, number)

    def late(target, *rest, **options):  # the call is made, then the process dies
        result = original(target, *rest, **options)
        if killing.ours(target):
            killing.calls += 1
            if killing.calls == number + 1:
                os._exit(9)
        return result

    setattr(place, attribute, late if after else killing)
    build(path)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "name", ["replace", "write", pytest.param("fsync", marks=pytest.mark.faults)]
)
def test_a_worker_may_die_around_every_call(name, after, reference, tmp_path):
    count = calls_of(name, tmp_path / "count")
    context = multiprocessing.get_context("fork")  # spawning would import torch every time
    for number in range(count):
        path = tmp_path / f"store-{number}"
        worker = context.Process(target=build_and_die, args=(path, name, number, after))
        worker.start()
        worker.join(60)
        assert worker.exitcode == 9
        build(path)
        assert contents(path) == reference, f"after a death at call {number} of {name}"


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


@pytest.mark.parametrize("kept", [0, 1, 8, -1])
def test_every_truncation_is_found(kept, tmp_path):
    path = tmp_path / "store"
    build(path)
    for file in sorted(path.glob("*.safetensors")):
        data = file.read_bytes()
        file.write_bytes(data[:kept])
        (problem,) = verify(path).problems
        assert file.name in problem
        with pytest.raises(StoreError, match=file.name):
            Datastore.open(path)
        file.unlink()
        (problem,) = verify(path).problems
        assert "must exist" in problem
        file.write_bytes(data)
    assert verify(path, "full").ok
