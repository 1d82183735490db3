"""Verify: sound stores pass, every kind of damage is found and told, none hides another."""

import pytest

from memlm.core.errors import InputError
from memlm.store.verify import verify
from store.making import build

FILES = [f"{kind}-0000{n}.safetensors" for kind in ("keys", "values", "documents") for n in (0, 2)]


@pytest.fixture
def path(tmp_path):
    build(tmp_path / "store").finalize()
    return tmp_path / "store"


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_sound_store_passes(path, level):
    report = verify(path, level)
    assert report.ok
    assert report.problems == ()
    assert report.notes == ()
    assert any("9 files" in line for line in report.checked)
    assert any("checksums" in line for line in report.checked) == (level == "full")
    assert report.to_dict()["ok"] is True
    assert report.describe().splitlines()[0].endswith("sound")


@pytest.mark.parametrize("name", FILES)
def test_missing_and_truncated_files_are_found_quickly(path, name):
    file = path / name
    file.write_bytes(file.read_bytes()[:-3])
    (problem,) = verify(path).problems
    assert name in problem
    assert "bytes" in problem
    file.unlink()
    (problem,) = verify(path).problems
    assert f"{name} must exist" in problem


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_by_the_full_level(path, name):
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)
    assert verify(path, "quick").ok
    report = verify(path, "full")
    (problem,) = report.problems
    assert name in problem
    assert "checksum" in problem
    assert report.describe().splitlines()[0].endswith(": 1 problem")


def test_a_damaged_header_is_found_quickly(path):
    file = path / FILES[0]
    file.write_bytes(file.read_bytes().replace(b"F32", b"I32"))
    (problem,) = verify(path).problems
    assert "torch.int32" in problem


def test_one_damage_does_not_hide_another(path):
    (path / FILES[0]).unlink()
    (path / FILES[3]).write_bytes(b"")
    assert len(verify(path, "full").problems) == 2


def test_damage_of_the_manifest_is_reported_not_raised(path, tmp_path):
    (path / "manifest.json").write_text("{")
    assert "does not parse" in verify(path).problems[0]
    assert "must exist" in verify(tmp_path / "nowhere").problems[0]


def test_an_unfinished_store_is_a_problem_and_leftovers_are_noted(tmp_path):
    build(tmp_path / "store", [0])
    report = verify(tmp_path / "store")
    assert "still being built" in report.problems[0]
    assert any("journal.jsonl" in note for note in report.notes)


def test_leftovers_of_a_sound_store_are_noted(path):
    (path / "x.1.tmp").write_bytes(b"")
    report = verify(path)
    assert report.ok
    assert "x.1.tmp" in report.notes[0]
    assert "x.1.tmp" in report.describe()


def test_reports_join(path):
    joined = verify(path).joined(verify(path, "full"))
    assert len(joined.checked) == len(verify(path).checked) + len(verify(path, "full").checked)


def test_an_unknown_level_is_named(path):
    with pytest.raises(InputError, match="'quick' or 'full', got 'deep'"):
        verify(path, "deep")  # type: ignore[arg-type]
