"""Faults of everything that writes: any call to the disk may fail, any process may die, files rot.

The law: whatever happened before, running the same thing again gives the bytes of an undisturbed
run, and until then what is there is refused, or is what was there before, or is whole. Damage of a
finished result is named. ``python -m tests.faults.table`` runs all of it and counts.
"""

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from memlm.core.errors import MemlmError, StoreError
from tests.faults.builders import BUILDERS, make_inputs
from tests.faults.disk import CALLS, FULL, READ_ONLY, die, fail, patched

IGNORED = ("build-log.jsonl", "locks", ".lock", ".tmp")
RECORDS = (".json", ".jsonl")
# What nothing refers to: without it the thing is another one, and whole.
OPTIONAL = ("deleted.json",)
# Files that carry no checksum: a damaged one is noticed only if it has another size.
UNCHECKED = ("state",)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Bytes and values of undisturbed builds, made once each."""
    made = {}

    def of(name):
        if name not in made:
            path = tmp_path_factory.mktemp("whole") / "it"
            begin(name, path, inputs)
            build(name, path, inputs)
            made[name] = contents(path), BUILDERS[name].read(path, inputs)
        return made[name]

    return of


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def count(record_property):
    """Tells the table that so many faults of a kind were tried on a builder."""
    return lambda name, kind, number: record_property("fault", (name, kind, number))


def begin(name: str, path: Path, inputs: Path) -> None:
    if not path.exists():
        BUILDERS[name].begin(path, inputs)


def build(name: str, path: Path, inputs: Path) -> None:
    BUILDERS[name].build(path, inputs)


def check_whole(name, path, inputs, whole, when: str = "") -> None:
    """What is there now is what an undisturbed build makes."""
    files, values = whole(name)
    found = contents(path)
    assert found.keys() == files.keys(), when
    if BUILDERS[name].exact:
        assert found == files, when
    assert BUILDERS[name].read(path, inputs) == values, when


def contents(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part in str(file.relative_to(path)) for part in IGNORED)
    }


def state_of(name: str, path: Path, inputs: Path):
    """What can be read at the path; None if it is refused."""
    try:
        return BUILDERS[name].read(path, inputs)
    except MemlmError:
        return None


def check_half(name, path, inputs, before, whole):
    """What a fault left behind is refused, as it was before, or whole."""
    found = state_of(name, path, inputs)
    assert found is None or found in (before, whole(name)[1])


def calls_of(name: str, call: str, path: Path, inputs: Path) -> int:
    """How often an undisturbed build makes the call."""
    begin(name, path, inputs)
    with patched(call, path) as counted:
        build(name, path, inputs)
    return counted.calls


def chosen(calls: int, most: int) -> list[int]:
    """At most so many of the calls, spread over all, first and last among them."""
    if calls <= most:
        return list(range(calls))
    return sorted({round(place * (calls - 1) / (most - 1)) for place in range(most)})


@pytest.mark.parametrize("most", [6, pytest.param(10**6, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", BUILDERS)
def test_every_call_to_the_disk_may_fail(name, most, inputs, whole, tmp_path, count):
    tried = 0
    for call in CALLS:
        for number in chosen(calls_of(name, call, tmp_path / call, inputs), most):
            path = tmp_path / f"{call}-{number}"
            begin(name, path, inputs)
            before = state_of(name, path, inputs)
            message = None
            with patched(call, path, number, act=fail(FULL)) as counted:
                try:
                    build(name, path, inputs)
                except StoreError as error:
                    message = str(error)
            assert counted.calls > number, "the call was not reached"
            assert message is None or "No space left on device" in message
            assert not list(path.rglob("*.tmp")) or call == "unlink"
            check_half(name, path, inputs, before, whole)
            build(name, path, inputs)
            check_whole(name, path, inputs, whole, f"after call {number} of {call} failed")
            tried += 1
    count(name, "calls refused", tried)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_read_only_disk_is_named(name, inputs, whole, tmp_path, count):
    path = tmp_path / "it"
    begin(name, path, inputs)
    for call in ("open", "os.open"):
        with (
            patched("mkdir", path, -2, act=fail(READ_ONLY)),
            patched("replace", path, -2, act=fail(READ_ONLY)),
            patched(call, path, -2, act=fail(READ_ONLY)),
            pytest.raises(MemlmError),
        ):
            build(name, path, inputs)
    build(name, path, inputs)
    check_whole(name, path, inputs, whole)
    count(name, "read-only", 2)


# --- processes that die


def work(name: str, path: Path, inputs: Path) -> None:
    torch.set_num_threads(1)
    build(name, path, inputs)


def work_and_die(name, path, inputs, call, number, after):
    torch.set_num_threads(1)
    with patched(call, path, number, **{"after" if after else "act": die}):
        build(name, path, inputs)


def start(job, *arguments):
    # A server that has imported everything forks the children, so each starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.builders", "memlm.testing.tiny"])
    process = context.Process(target=job, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("most", [1, pytest.param(10**6, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_process_may_die_around_every_call(name, most, inputs, whole, tmp_path, count):
    tried = 0
    for call in ("replace", "file.write", "os.write", "fsync", "link", "unlink"):
        calls = calls_of(name, call, tmp_path / call, inputs)
        for number in chosen(calls, most) if most > 1 else range(calls // 2, calls)[:1]:
            for after in (False, True) if most > 1 else (number % 2 == 0,):
                path = tmp_path / f"{call}-{number}-{after}"
                begin(name, path, inputs)
                before = state_of(name, path, inputs)
                process = start(work_and_die, name, path, inputs, call, number, after)
                process.join(60)
                assert process.exitcode == 9
                check_half(name, path, inputs, before, whole)
                build(name, path, inputs)
                check_whole(name, path, inputs, whole, f"death at call {number} of {call}")
                tried += 1
    count(name, "deaths at a call", tried)


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", BUILDERS)
def test_killed_at_any_moment(name, kills, inputs, whole, tmp_path, count):
    """Every other kill is followed by another one, before the rest is done."""
    draw = random.Random(name)
    path = tmp_path / "clock"
    begin(name, path, inputs)
    begun = time.perf_counter()
    build(name, path, inputs)
    duration = time.perf_counter() - begun
    for number in range(kills):
        path = tmp_path / f"it-{number // 2}"
        begin(name, path, inputs)
        before = state_of(name, path, inputs)
        process = start(work, name, path, inputs)
        time.sleep(draw.uniform(0, 3 * duration))
        process.kill()
        process.join(60)
        check_half(name, path, inputs, before, whole)
        if number % 2 or number == kills - 1:
            build(name, path, inputs)
            check_whole(name, path, inputs, whole, f"after kill {number}")
            shutil.rmtree(path)
    count(name, "SIGKILLs", kills)


@pytest.mark.parametrize("name", BUILDERS)
def test_two_at_once(name, inputs, whole, tmp_path, count):
    """Both end well, or one says in a sentence why not; the result is the same."""
    path = tmp_path / "it"
    begin(name, path, inputs)
    processes = [start(work, name, path, inputs) for _ in range(2)]
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    assert codes == [0, 0] if not BUILDERS[name].alone else codes.count(0) >= 1
    build(name, path, inputs)
    check_whole(name, path, inputs, whole)
    count(name, "two at once", 1)


# --- journals that are torn, files that rot


@pytest.mark.parametrize("name", BUILDERS)
def test_torn_and_doubled_journal_lines(name, inputs, whole, tmp_path, count):
    calls = calls_of(name, "replace", tmp_path / "count", inputs)
    tried = 0
    for number in chosen(calls, 4):
        path = tmp_path / str(number)
        begin(name, path, inputs)
        with patched("replace", path, number, act=fail(FULL)), pytest.raises(StoreError):
            build(name, path, inputs)
        for journal in sorted(path.rglob("*.jsonl")):
            data = journal.read_bytes()
            lines = data.split(b"\n")
            for broken in (data + data, data + lines[-2][: len(lines[-2]) // 2], data[:-3]):
                copy = tmp_path / f"{number}-{tried}"
                shutil.copytree(path, copy)
                (copy / journal.relative_to(path)).write_bytes(broken)
                build(name, copy, inputs)
                check_whole(name, copy, inputs, whole, f"{journal.name} after call {number}")
                tried += 1
    count(name, "journals torn or doubled", tried)


def damaged(data: bytes, most: int):
    """The bytes cut short in several places, and with single bits flipped."""
    for kept in sorted({0, 1, len(data) // 2, len(data.rstrip()) - 1}):
        yield "cut", data[:kept]
    for place in chosen(len(data), most):
        yield "flipped", data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


@pytest.mark.parametrize("most", [4, pytest.param(200, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", BUILDERS)
def test_damage_is_named(name, most, inputs, whole, tmp_path, count):
    path = tmp_path / "it"
    begin(name, path, inputs)
    build(name, path, inputs)
    tried = dict.fromkeys(("cut", "flipped", "missing"), 0)
    for place, data in contents(path).items():
        file = path / place
        if file.name in OPTIONAL:
            continue
        file.unlink()
        with pytest.raises(MemlmError):
            BUILDERS[name].read(path, inputs)
        tried["missing"] += 1
        for kind, broken in damaged(data, most):
            loose = file.suffix in RECORDS or file.name in UNCHECKED
            if kind == "flipped" and loose:
                continue
            file.write_bytes(broken)
            with pytest.raises(MemlmError):
                BUILDERS[name].read(path, inputs)
            tried[kind] += 1
        file.write_bytes(data)
    assert BUILDERS[name].read(path, inputs) == whole(name)[1]
    for kind, number in tried.items():
        count(name, f"files {kind}", number)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_newer_format_is_refused(name, inputs, tmp_path, count):
    path = tmp_path / "it"
    begin(name, path, inputs)
    build(name, path, inputs)
    tried = 0
    for place, data in contents(path).items():
        if not place.endswith(".json"):
            continue
        record = json.loads(data)
        if not isinstance(record, dict) or "format_version" not in record:
            continue
        (path / place).write_text(json.dumps({**record, "format_version": 99}))
        with pytest.raises(MemlmError):
            BUILDERS[name].read(path, inputs)
        (path / place).write_bytes(data)
        tried += 1
    count(name, "newer format", tried)
