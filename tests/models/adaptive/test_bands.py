"""Cutting a vocabulary into bands."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlm.core.errors import InputError
from memlm.models.adaptive.bands import make_bands


def test_the_published_bands():
    bands = make_bands(267744, [20000, 60000], 1024, 4)
    assert [(band.begin, band.end, band.width) for band in bands] == [
        (0, 20000, 1024),
        (20000, 60000, 256),
        (60000, 267744, 64),
    ]


@given(st.sets(st.integers(1, 99), max_size=5), st.booleans())
def test_every_word_is_in_one_band(cutoffs, closed):
    cuts = [*sorted(cutoffs), *([100] if closed else [])]
    bands = make_bands(100, cuts, 64, 1.5)
    assert sum(band.size for band in bands) == 100
    assert [band.begin for band in bands[1:]] == [band.end for band in bands[:-1]]
    assert len(bands) == len(cutoffs) + 1


@pytest.mark.parametrize("cutoffs", [[50, 20], [0, 20], [20, 20], [20, 101], [100, 100]])
def test_cutoffs_that_do_not_rise(cutoffs):
    with pytest.raises(InputError, match="cutoffs must rise"):
        make_bands(100, cutoffs, 64, 4)


def test_a_band_without_width():
    with pytest.raises(InputError, match="must keep a width of at least 1"):
        make_bands(100, [20, 50], 8, 4)
