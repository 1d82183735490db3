"""Writing: the same bytes whoever does what in which order, and nothing wrong gets in."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import FingerprintError, InputError, StoreError
from memlm.store.arrays import save_arrays
from memlm.store.manifest import PlannedRange
from memlm.store.reader import Datastore
from memlm.store.writer import StoreWriter
from store.making import (
    DIM,
    ROWS,
    VOCAB,
    build,
    contents,
    entries,
    identity,
    info,
    open_writer,
    ranges,
)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "store"
    build(path).finalize()
    return contents(path)


def test_a_store_has_exactly_the_files_of_the_contract(reference):
    shards = [
        f"{kind}-0000{n}.safetensors" for kind in ("documents", "keys", "values") for n in range(3)
    ]
    assert sorted(reference) == sorted([*shards, "manifest.json"])


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(len(ROWS))), stops=st.sets(st.integers(0, 2)))
def test_order_and_reopening_do_not_change_the_bytes(order, stops, reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("order") / "store"
    writer = open_writer(path)
    for place, number in enumerate(order):
        if place in stops:
            writer = open_writer(path)
        assert number in writer.pending()
        with writer.claim(number) as mine:
            assert mine
            writer.write(number, *entries(number))
        assert number not in writer.pending()
    assert writer.finished_rows() == sum(ROWS)
    writer.finalize()
    assert contents(path) == reference


def test_an_entry_may_come_in_any_format_that_means_the_same(reference, tmp_path):
    writer = open_writer(tmp_path / "store")
    for number in range(len(ROWS)):
        keys, values, documents, positions = entries(number)
        writer.write(
            number,
            keys.double().numpy(),
            values.to(torch.int16),
            documents.numpy().astype(np.uint16),
            positions.to(torch.int32),
        )
    writer.finalize()
    assert contents(tmp_path / "store") == reference


def test_finalize_is_idempotent_and_opening_again_finds_nothing_to_do(reference, tmp_path):
    path = tmp_path / "store"
    first, second = build(path), open_writer(path)
    assert first.finalize().fingerprint == first.finalize().fingerprint
    assert second.pending() == []
    with second.claim(0) as mine:
        assert not mine
    assert second.finalize().fingerprint == first.finalize().fingerprint
    third = open_writer(path)
    assert third.complete
    assert third.pending() == []
    assert third.finished_rows() == sum(ROWS)
    assert len(third.finalize()) == sum(ROWS)
    assert contents(path) == reference
    with pytest.raises(StoreError, match="is complete"):
        third.write(0, *entries(0))


def test_a_range_is_done_by_one_worker_at_a_time(tmp_path):
    first, second = open_writer(tmp_path / "store"), open_writer(tmp_path / "store")
    with first.claim(1) as mine, second.claim(1) as too, second.claim(2) as other:
        assert mine
        assert not too
        assert other
    with second.claim(1) as mine:
        assert mine
        second.write(1, *entries(1))
    with first.claim(1) as mine:
        assert not mine, "it was finished by the other one"


def test_a_claim_is_given_back_when_the_work_fails(tmp_path):
    first, second = open_writer(tmp_path / "store"), open_writer(tmp_path / "store")
    with pytest.raises(KeyError), first.claim(0):
        raise KeyError
    with second.claim(0) as mine:
        assert mine


def hold(path, ready):
    with open_writer(path).claim(0) as mine:
        (path / "keys-00000.safetensors.999.tmp").write_bytes(b"half")
        ready.put(mine)
        time.sleep(60)


def test_a_killed_worker_loses_its_claim_and_its_leftovers(reference, tmp_path):
    path = tmp_path / "store"
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    worker = context.Process(target=hold, args=(path, ready))
    worker.start()
    try:
        assert ready.get(timeout=60)
        writer = open_writer(path)
        with writer.claim(0) as mine:
            assert not mine
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    build(path).finalize()
    assert contents(path) == reference


@pytest.mark.parametrize(
    "garbage",
    [
        b'{"range":0,"rows":5',
        b"\x00\xff\n",
        b'{"range":0,"rows":5,"sizes":{},"checksums":{}}\n',
        b'{"range":-1,"rows":5,"sizes":{},"checksums":{}}\n',
        b'{"range":99,"rows":5,"sizes":{},"checksums":{}}\n',
        b"7\n[]\n{}\n",
    ],
)
def test_torn_and_foreign_journal_lines_are_passed_over(garbage, reference, tmp_path):
    path = tmp_path / "store"
    build(path, [1])
    with open(path / "journal.jsonl", "ab") as file:
        file.write(garbage)
    writer = open_writer(path)
    assert writer.pending() == [0, 2]
    build(path).finalize()
    assert contents(path) == reference


def test_doubled_journal_lines_change_nothing(reference, tmp_path):
    path = tmp_path / "store"
    build(path)
    journal = path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() * 2)
    build(path).finalize()
    assert contents(path) == reference


@pytest.mark.parametrize("damage", ["missing", "short"])
@pytest.mark.parametrize("kind", ["keys", "values", "documents"])
def test_a_finished_range_without_its_files_is_pending_again(kind, damage, reference, tmp_path):
    path = tmp_path / "store"
    build(path)
    file = path / f"{kind}-00001.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert open_writer(path).pending() == [1]
    build(path).finalize()
    assert contents(path) == reference


def test_an_unfinished_store_is_not_finalized(tmp_path):
    writer = build(tmp_path / "store", [1])
    with pytest.raises(StoreError, match=r"all 3 ranges .* 2 are not \(0, 2\)"):
        writer.finalize()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"model_hash": "x", "threads": 4}])
def test_another_identity_is_refused_by_name(change, finished, tmp_path):
    path = tmp_path / "store"
    writer = build(path)
    if finished:
        writer.finalize()
    before = contents(path)
    with pytest.raises(
        FingerprintError, match=f"{next(iter(change))} is .* here and .* there"
    ) as e:
        open_writer(path, **change)
    assert writer.manifest.plan_fingerprint in str(e.value)
    assert str(e.value).count("xxh3_128:") == 2
    assert contents(path) == before


def test_another_plan_or_setting_is_refused(tmp_path):
    build(tmp_path / "store")
    with pytest.raises(FingerprintError, match="2 ranges of 13 entries here and 3 of 13 there"):
        StoreWriter.open(tmp_path / "store", identity(), ranges((6, 7)), info=info())
    with pytest.raises(FingerprintError, match="metric is 'ip' here and 'l2' there"):
        StoreWriter.open(tmp_path / "store", identity(), ranges(), info=info(metric="ip"))


def test_a_directory_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match=r"new or empty directory.*thesis\.tex"):
        open_writer(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_cannot_be_a_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="must be a directory that can be written"):
        open_writer(tmp_path / "file")
    with pytest.raises(StoreError, match="must be a directory that can be written"):
        open_writer(tmp_path / "file" / "below")


def test_a_read_only_directory_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match="Permission denied"):
        open_writer(tmp_path / "store")


def test_a_newer_format_is_not_continued(tmp_path):
    build(tmp_path / "store", [0])
    file = tmp_path / "store" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(StoreError, match="format version 99"):
        open_writer(tmp_path / "store")


def changed(place, value):
    def make():
        columns = list(entries(0))
        columns[place] = value(columns[place])
        return columns

    return make


def with_row(row, value):
    def change(column):
        column = column.clone()
        column[row] = value
        return column

    return change


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (changed(0, lambda k: k[:4]), r"keys of range 0 must be .* \(5, 4\), got .* \(4, 4\)"),
        (changed(0, lambda k: k[:, :3]), r"shape \(5, 4\), got"),
        (changed(0, lambda k: k.int()), "floating point.*got torch.int32"),
        (changed(0, with_row(2, float("nan"))), "1 of 5 rows are not.*row 2, came as NaN"),
        (changed(0, with_row(3, float("inf"))), "1 of 5 rows are not.*row 3, came as NaN or inf"),
        (changed(1, lambda v: v[:4]), "values of range 0 must be 5 integers"),
        (changed(1, lambda v: v.float()), "must be 5 integers, got torch.float32"),
        (changed(1, with_row(1, -100)), "1 of 5 do not; the first of them is -100 in row 1"),
        (changed(1, with_row(4, VOCAB)), f"between 0 and {VOCAB - 1}.*is {VOCAB} in row 4"),
        (changed(2, with_row(0, 2**31)), "documents of range 0 must lie between 0 and 2147483647"),
        (changed(3, with_row(0, -1)), "positions of range 0 .* -1 in row 0"),
        (changed(2, lambda _: None), "come with documents and positions"),
    ],
)
def test_bad_entries_are_named_and_nothing_is_written(make, message, tmp_path):
    writer = open_writer(tmp_path / "store")
    before = contents(tmp_path / "store")
    with pytest.raises(InputError, match=message):
        writer.write(0, *make())
    assert contents(tmp_path / "store") == before
    assert writer.pending() == [0, 1, 2]


def test_keys_that_overflow_float16_are_refused_with_a_way_out(tmp_path):
    writer = open_writer(tmp_path / "half", dtype="float16")
    keys, *rest = entries(0)
    keys[1, 2], keys[4, 0] = 7e4, -7e4
    with pytest.raises(InputError, match=r"2 of 5 rows .* row 1, does not fit into float16; use b"):
        writer.write(0, keys, *rest)
    open_writer(tmp_path / "brain", dtype="bfloat16").write(0, keys, *rest)


@pytest.mark.parametrize("number", [-1, 3])
def test_an_unknown_range_is_named(number, tmp_path):
    writer = open_writer(tmp_path / "store")
    with pytest.raises(InputError, match=f"between 0 and 2, got {number}"):
        writer.write(number, *entries(0))
    with pytest.raises(InputError, match=f"got {number}"), writer.claim(number):
        pass


def test_a_store_without_places_takes_none(tmp_path):
    writer = StoreWriter.open(
        tmp_path, identity(), [PlannedRange(0, 1, 5)], info=info(places=False)
    )
    with pytest.raises(InputError, match="without documents and positions"):
        writer.write(0, *entries(0))
    writer.write(0, *entries(0)[:2])
    store = writer.finalize()
    assert store.documents is None
    assert store.positions is None


# --- save_arrays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_arrays_come_back(dtype, tmp_path):
    keys = torch.randn(11, DIM).to(getattr(torch, dtype))
    values, documents, positions = (
        torch.randint(0, VOCAB, (11,)),
        torch.arange(11),
        torch.arange(11),
    )
    store = save_arrays(
        tmp_path, keys, values, documents=documents, positions=positions, shard_rows=4, metric="ip"
    )
    assert len(store.manifest.shards) == 3
    assert store.metric == "ip"
    assert torch.equal(store.load_keys(), keys)
    assert store.values.tolist() == values.tolist()
    assert store.documents is not None
    assert store.documents.tolist() == documents.tolist()


def test_memory_maps_are_read_shard_by_shard(tmp_path):
    keys = np.random.default_rng(0).normal(size=(9, DIM)).astype(np.float16)
    keys.tofile(tmp_path / "raw")
    mapped = np.memmap(tmp_path / "raw", dtype=np.float16, mode="r", shape=(9, DIM))
    store = save_arrays(tmp_path / "store", mapped, np.arange(9, dtype=np.int64), shard_rows=4)
    assert store.load_keys().numpy().tobytes() == keys.tobytes()
    assert store.documents is None


def test_interrupted_arrays_are_continued(tmp_path, monkeypatch):
    keys, values = torch.randn(9, DIM), torch.arange(9)
    save_arrays(tmp_path / "whole", keys, values, shard_rows=2)
    written = StoreWriter.write

    def die(self, number, *columns, **named):
        if number == 3:
            raise KeyboardInterrupt
        written(self, number, *columns, **named)

    monkeypatch.setattr(StoreWriter, "write", die)
    with pytest.raises(KeyboardInterrupt):
        save_arrays(tmp_path / "cut", keys, values, shard_rows=2)
    monkeypatch.undo()
    with pytest.raises(FingerprintError, match="corpus_hash"):
        save_arrays(tmp_path / "cut", keys, values + 1, shard_rows=2)
    save_arrays(tmp_path / "cut", keys, values, shard_rows=2)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    save_arrays(tmp_path / "cut", keys, values, shard_rows=2)  # a complete store is opened
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    with pytest.raises(FingerprintError, match="a complete datastore of other keys"):
        save_arrays(tmp_path / "cut", keys + 1, values, shard_rows=2)
    assert isinstance(Datastore.open(tmp_path / "cut"), Datastore)


KEYS, VALUES = torch.zeros(3, DIM), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("keys", "values", "options", "message"),
    [
        (KEYS[0], VALUES, {}, r"shape \(entries, dim\).*got \(4,\)"),
        (KEYS[:0], VALUES[:0], {}, r"at least one entry, got \(0, 4\)"),
        (KEYS, VALUES[:2], {}, r"values must have shape \(3,\) .* got \(2,\)"),
        (KEYS, VALUES, {"documents": VALUES}, "together or not at all"),
        (KEYS, VALUES, {"shard_rows": 0}, "shard_rows must be at least 1"),
        (KEYS.double(), VALUES, {}, "one of float16, bfloat16, float32, got 'float64'"),
        (KEYS, VALUES + 9, {"vocab_size": 9}, "between 0 and 8"),
        (KEYS, VALUES, {"metric": "cos"}, "metric must be one of"),
    ],
)
def test_bad_arrays_are_named(keys, values, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_arrays(tmp_path / "store", keys, values, **options)
