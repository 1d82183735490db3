"""The manifest: round trip, fingerprints, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memlm.core.errors import CorruptStoreError, InputError, StoreError
from memlm.core.files import write_json
from memlm.store.manifest import (
    Identity,
    Manifest,
    PlannedRange,
    ShardRecord,
    StoreInfo,
    plan_ranges,
    read_manifest,
)
from store.making import build, identity, info, ranges


@pytest.fixture
def complete(tmp_path):
    build(tmp_path / "store").finalize()
    return tmp_path / "store"


def test_a_manifest_round_trips_through_json(complete):
    manifest = read_manifest(complete)
    again = Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint
    assert manifest.complete
    assert len(manifest) == 13
    assert manifest.shards[2].rows == 7


def test_no_time_host_or_path_is_in_the_manifest(complete):
    text = (complete / "manifest.json").read_text()
    assert str(complete.parent) not in text
    assert "time" not in json.loads(text)
    assert (complete / "build-log.jsonl").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model_hash": "other"},
        {"tokenizer_hash": None},
        {"tap": "ffn_input"},
        {"dim": 5},
        {"dtype": "float16"},
        {"corpus_hash": "other"},
        {"windows": {"kind": "SlidingWindows", "length": 9}},
        {"batch_tokens": 65},
        {"threads": 2},
    ],
)
def test_the_fingerprint_follows_everything_the_bytes_depend_on(change):
    assert identity(**change).fingerprint != identity().fingerprint
    (difference,) = identity(**change).differences(identity())
    assert difference.startswith(next(iter(change)))


def test_the_name_of_the_model_does_not_count():
    assert identity(model="/elsewhere/tiny").fingerprint == identity().fingerprint
    assert identity(model="/elsewhere/tiny").differences(identity()) == []


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=30), size=st.integers(1, 20))
def test_planned_ranges_tile_the_windows(counts, size):
    planned = plan_ranges(counts, size)
    assert [item for r in planned for item in counts[r.first_window : r.last_window]] == counts
    for item in planned:
        assert item.rows == sum(counts[item.first_window : item.last_window])
        assert item.rows <= size or item.last_window == item.first_window + 1
    assert Manifest(identity(), info(), planned).ranges == planned


def altered(complete, change):
    values = json.loads((complete / "manifest.json").read_text())
    change(values)
    write_json(complete / "manifest.json", values)
    return read_manifest(complete)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v: v.update(format_version=2), StoreError, "newer than this memlm reads"),
        (lambda v: v.update(format="x"), CorruptStoreError, "manifest of a memlm datastore"),
        (lambda v: v.pop("ranges"), CorruptStoreError, "not a valid manifest.*ranges"),
        (lambda v: v["shards"].pop(), CorruptStoreError, "one shard per range"),
        (lambda v: v["shards"][0].update(rows=6), CorruptStoreError, "one shard per range"),
        (lambda v: v["identity"].update(dim=5), CorruptStoreError, "was altered"),
        (lambda v: v["ranges"].reverse(), CorruptStoreError, "follow one another"),
        (
            lambda v: v["shards"][0]["checksums"].update({"../../secret": "x"}),
            CorruptStoreError,
            r"must have the files documents-00000.*got \.\./\.\./secret",
        ),
        (
            lambda v: v["shards"][0].update(
                {"sizes": {"/etc/passwd": 1}, "checksums": {"/etc/passwd": "x"}}
            ),
            CorruptStoreError,
            "must have the files",
        ),
        (lambda v: v["shards"][1].update(range="x"), CorruptStoreError, "malformed"),
        (lambda v: v["shards"].insert(0, 7), CorruptStoreError, "malformed"),
    ],
)
def test_a_damaged_manifest_is_refused(complete, change, error, message):
    with pytest.raises(error, match=message):
        altered(complete, change)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "does not parse"), (b"[]", "one JSON object"), (b"\xff", "does not parse")],
)
def test_a_manifest_that_is_no_json_object_is_refused(complete, text, message):
    (complete / "manifest.json").write_bytes(text)
    with pytest.raises(CorruptStoreError, match=message):
        read_manifest(complete)


def test_a_path_without_a_store_is_named(tmp_path):
    with pytest.raises(CorruptStoreError, match=r"nowhere.*must exist"):
        read_manifest(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CorruptStoreError, match="is the path right"):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: identity(dim=0), "dim must be at least 1, got 0"),
        (lambda: identity(dtype="int8"), "one of float16, bfloat16, float32, got 'int8'"),
        (lambda: StoreInfo(metric="cos"), "one of l2, ip, cosine, got 'cos'"),
        (lambda: StoreInfo(vocab_size=0), "vocab_size must be at least 1"),
        (lambda: StoreInfo(documents=0), "documents must be at least 1"),
        (lambda: Manifest(identity(), info(), ()), "at least one range"),
        (
            lambda: Manifest(identity(), info(), (PlannedRange(0, 2, 1), PlannedRange(3, 4, 1))),
            "without gaps, but range 1 spans windows 3 to 4 after window 2",
        ),
        (lambda: Manifest(identity(), info(), (PlannedRange(0, 1, 0),)), "at least one row"),
        (
            lambda: Manifest(identity(), info(), tuple(ranges()), complete=True),
            "3 ranges do not match 0 shards",
        ),
        (lambda: ShardRecord.from_dict({}, StoreInfo()), "malformed"),
        (lambda: plan_ranges([], 4), "at least one window"),
        (lambda: plan_ranges([1], 0), "shard_rows must be at least 1"),
        (
            lambda: Identity.from_dict({**identity().to_dict(), "colour": 1}),
            "no setting named colour",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(InputError, match=message):
        build()
