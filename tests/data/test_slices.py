"""Parts of a corpus against the plain slices of its documents."""

import numpy as np
import pytest

from memlm.core.errors import InputError
from memlm.data.slices import slice_corpus, truncate
from memlm.data.tokens import TokenCorpus


def corpus(begin=None):
    rows = [list(range(10, 17)), [], list(range(20, 25)), list(range(30, 40))]
    rows = [[begin, *row] if begin is not None else row for row in rows]
    return TokenCorpus(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        names=("a", "b", "c", "d"),
        text_bytes=np.array([7, 0, 5, 10]),
        begin_token=begin,
    )


def rows(part):
    return [part.tokens[a:b].tolist() for a, b in zip(part.offsets, part.offsets[1:], strict=False)]


@pytest.mark.parametrize("begin", [None, 1])
@pytest.mark.parametrize(
    ("settings", "names", "expected"),
    [
        ({}, "acd", [range(10, 17), range(20, 25), range(30, 40)]),
        ({"start": 1, "count": 2}, "c", [range(20, 25)]),
        ({"length": 4}, "acd", [range(10, 14), range(20, 24), range(30, 34)]),
        ({"length": 4, "side": "left", "start": 2}, "cd", [range(21, 25), range(36, 40)]),
        ({"length": 5, "side": "center", "start": 3}, "d", [[30, 31, 37, 38, 39]]),
        ({"first": 5, "tokens": 9}, "acd", [range(15, 17), range(20, 25), range(30, 32)]),
        ({"length": 4, "first": 6, "tokens": 3}, "cd", [range(22, 24), range(30, 31)]),
    ],
)
def test_a_part_is_the_slices_of_its_documents(begin, settings, names, expected):
    part = slice_corpus(corpus(begin), **settings)
    before = [] if begin is None else [begin]
    assert rows(part) == [[*before, *row] for row in expected]
    assert "".join(part.names) == names
    whole = all(len(row) in (7, 5, 10) for row in expected)
    assert (part.text_bytes is not None) == (whole and settings.get("length") is None)


def test_what_cannot_be_is_refused():
    for settings, words in (
        ({"start": 9}, "must have tokens, got none from document 9"),
        ({"first": 99}, "must have tokens"),
        ({"start": -1}, "start must not be negative"),
        ({"count": 0}, "count must be at least 1"),
        ({"length": 0}, "at least 1 token"),
        ({"length": 3, "side": "top"}, "side must be left, right or center"),
    ):
        with pytest.raises(InputError, match=words):
            slice_corpus(corpus(), **settings)
    assert truncate([1, 2, 3], None) == [1, 2, 3]
