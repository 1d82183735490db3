"""Raw arrays: what their sizes say, and what they do not."""

import numpy as np
import pytest

from memlm.core.errors import CorruptStoreError, InputError
from memlm.formats.memmaps import find_files, infer_layout, read_arrays, unwritten


def write(folder, stem, keys, values, weights=None):
    for kind, array in (("keys", keys), ("vals", values), ("weights", weights)):
        if array is not None:
            array.tofile(folder / f"{stem}{kind}.npy")
    return folder / f"{stem}keys.npy"


def arrays(entries=6, dim=3, dtype="float16", values="int64"):
    draw = np.random.default_rng(0)
    return (
        draw.normal(size=(entries, dim)).astype(dtype),
        draw.integers(1, 50, entries).astype(values),
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("values", ["int16", "int32", "int64"])
@pytest.mark.parametrize("dim", [3, 7, 8])
def test_every_format_comes_back(tmp_path, dtype, values, dim):
    keys, tokens = arrays(dim=dim, dtype=dtype, values=values)
    path = write(tmp_path, "dstore_", keys, tokens)
    read = read_arrays(path, dim=dim, dtype=dtype)
    np.testing.assert_array_equal(read.keys, keys)
    np.testing.assert_array_equal(read.values, tokens)
    assert read.weights is None


def test_names_say_sizes(tmp_path):
    keys, tokens = arrays(8, 4)
    knn = write(tmp_path, "dstore_gpt2_8_4_", keys, tokens.astype("int32"))
    np.testing.assert_array_equal(read_arrays(knn).keys, keys)
    efficient = write(tmp_path, "dstore_size8_embed4_fp16_", keys, tokens)
    np.testing.assert_array_equal(read_arrays(efficient).values, tokens)


def test_weights_of_a_merged_store(tmp_path):
    keys, tokens = arrays(8, 4)
    stem = "dstore_merge9_size8_embed4_fp16_"
    path = write(tmp_path, stem, keys, tokens, np.arange(1, 9))
    assert read_arrays(path).weights.tolist() == list(range(1, 9))
    (tmp_path / f"{stem}weights.npy").write_bytes(b"123")
    with pytest.raises(InputError, match="must hold one weight of 4 or 8 bytes for each of 8"):
        read_arrays(path)


def test_token_ids_of_two_bytes_are_unsigned(tmp_path):
    keys, _ = arrays(2, 3)
    path = write(tmp_path, "dstore_", keys, np.array([-1, 5], "int16"))
    assert read_arrays(path, dim=3, dtype="float16").values.tolist() == [65535, 5]


def test_files_with_a_numpy_header(tmp_path):
    keys, tokens = arrays()
    np.save(tmp_path / "keys.npy", keys)
    np.save(tmp_path / "vals.npy", tokens[:, None])
    read = read_arrays(tmp_path)
    np.testing.assert_array_equal(read.keys, keys)
    np.testing.assert_array_equal(read.values, tokens)
    np.save(tmp_path / "vals.npy", tokens[1:])
    with pytest.raises(CorruptStoreError, match="must hold one row per value"):
        read_arrays(tmp_path)


def test_several_readings_are_refused(tmp_path):
    keys, tokens = arrays(dim=4)
    path = write(tmp_path, "dstore_", keys, tokens)
    with pytest.raises(InputError, match=r"must allow one reading, but .* give dim or dtype"):
        read_arrays(path)
    values = path.with_name("dstore_vals.npy")
    assert infer_layout(path, values, entries=6, dtype="float16") == (6, 4, "float16", 8)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"dim": 5}, "dim 5 explains"),
        ({"entries": 7, "dtype": "float16"}, "entries 7, dtype float16 explains"),
        ({"dtype": "int8"}, "dtype must be one of float16, float32, got 'int8'"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, known, message):
    keys, tokens = arrays()
    with pytest.raises(InputError, match=message):
        read_arrays(write(tmp_path, "dstore_", keys, tokens), **known)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match=r"must hold one file named ...keys.npy, got 0"):
        find_files(tmp_path)
    keys, tokens = arrays()
    write(tmp_path, "a_", keys, tokens)
    assert find_files(tmp_path / "a") == find_files(tmp_path)
    (tmp_path / "a_vals.npy").unlink()
    with pytest.raises(InputError, match=r"a_vals.npy must exist but does not"):
        find_files(tmp_path)


def test_rows_that_nobody_filled(tmp_path):
    keys, tokens = arrays(6, 4)
    keys[2] = 0
    keys[4:], tokens[4:] = 0, 0
    read = read_arrays(write(tmp_path, "dstore_6_4_", keys, tokens))
    assert unwritten(read) == 2
