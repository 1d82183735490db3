"""Reading pickled members: only matrices of numbers, whatever wrote them, and nothing is run."""

import io
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest

from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.members import read_members

OFFSETS, MEMBERS, SHAPE = [0, 2, 2, 5], [1, 4, 0, 2, 6], (3, 8)


def matrix(module="scipy.sparse._csr", name="csr_matrix", **changes):
    """What SciPy pickles, without SciPy: an object of a class of that module and name."""
    kind = type(name, (), {"__module__": module})
    one = kind()
    one.__dict__ = {
        "_shape": SHAPE,
        "maxprint": 50,
        "indptr": np.array(OFFSETS, np.int32),
        "indices": np.array(MEMBERS, np.int32),
        "data": np.ones(len(MEMBERS), np.int64),
        **changes,
    }
    return one, kind


def pickled(monkeypatch, module="scipy.sparse._csr", protocol=4, **changes):
    one, kind = matrix(module, **changes)
    # pickle looks the class up where it says it is from
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    setattr(sys.modules[module], kind.__name__, kind)
    data = pickle.dumps(one, protocol=protocol)
    monkeypatch.undo()
    return data


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "members.pkl"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("module", ["scipy.sparse.csr", "scipy.sparse._csr"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_matrix_of_any_time_and_protocol(monkeypatch, write, module, protocol):
    got = read_members(write(pickled(monkeypatch, module, protocol)))
    assert got.offsets.tolist() == OFFSETS
    assert got.members.tolist() == MEMBERS
    assert got.entries == 8


def test_the_old_module_path_of_numpy(monkeypatch, write):
    data = pickled(monkeypatch)
    assert data.count(b"numpy._core.multiarray") == 1
    old = b"numpy.core.multiarray"
    data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c" + bytes([len(old)]) + old)
    # one byte less in a frame that says its length
    length = int.from_bytes(data[3:11], "little") - 1
    data = data[:3] + length.to_bytes(8, "little") + data[11:]
    assert read_members(write(data)).members.tolist() == MEMBERS


def test_an_index_of_64_bits(monkeypatch, write):
    wide = np.array(MEMBERS, np.int64)
    assert read_members(write(pickled(monkeypatch, indices=wide))).members.tolist() == MEMBERS


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function",
    [os.system, subprocess.check_output, eval, getattr, io.open, np.load, np.fromfile],
    ids=lambda function: function.__name__,
)
def test_foreign_names_are_refused_and_never_called(write, tmp_path, function):
    witness = tmp_path / "it-ran"
    data = pickle.dumps(Runs(function, f"touch {witness}"))
    with pytest.raises(InputError, match="nothing but a sparse matrix"):
        read_members(write(data))
    assert not witness.exists()


def test_a_foreign_name_inside_a_matrix_is_refused(monkeypatch, write, tmp_path):
    witness = tmp_path / "it-ran"
    data = pickled(monkeypatch, data=Runs(os.system, f"touch {witness}"))
    with pytest.raises(InputError, match=r"posix.system|nt.system"):
        read_members(write(data))
    assert not witness.exists()


def test_another_codec_is_refused(write):
    import _codecs

    with pytest.raises(CorruptStoreError, match="latin1"):
        read_members(write(pickle.dumps(Runs(_codecs.encode, "abc", "utf-8"))))


def test_other_contents(monkeypatch, write):
    with pytest.raises(InputError, match="one sparse matrix, got list"):
        read_members(write(pickle.dumps([1, 2])))
    with pytest.raises(CorruptStoreError, match="'indptr'"):
        read_members(write(pickled(monkeypatch, indptr=np.array([0.5]))))
    with pytest.raises(CorruptStoreError, match="do not fit the shape"):
        read_members(write(pickled(monkeypatch, _shape=(7, 8))))
    with pytest.raises(CorruptStoreError, match="do not fit the shape"):
        read_members(write(pickled(monkeypatch, _shape=(3, 5))))


def test_damaged_files(monkeypatch, write, tmp_path):
    data = pickled(monkeypatch)
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptStoreError, match="cannot be read"):
            read_members(write(data[:cut]))
    with pytest.raises(CorruptStoreError, match="must exist"):
        read_members(tmp_path / "nowhere.pkl")
