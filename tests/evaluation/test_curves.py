"""Smoothing keeps a constant; the bound of scores never falls."""

import numpy as np
import pytest

from memlm.core.errors import InputError
from memlm.evaluation.curves import score_bound, smooth


def test_a_constant_stays_what_it_is():
    np.testing.assert_allclose(smooth([3.0] * 50, 0.97), 3.0)
    assert smooth([3.0] * 5, 0.97, rule="original")[0] == pytest.approx(0.09)
    np.testing.assert_array_equal(smooth([1, 5, 2], 0), [1, 5, 2])
    assert smooth([1.0, 2.0], 0.5)[1] == pytest.approx((0.5 * 0.5 * 1 + 0.5 * 2) / 0.75)


def test_the_bound_is_the_largest_so_far():
    found = score_bound([[9, 1, 3, 2], [0, 5, 1, 4]], longest=3)
    np.testing.assert_array_equal(found.rows, [[2, 3, 3], [4, 4, 5]])
    np.testing.assert_allclose(found.mean, [3, 3.5, 4])
    np.testing.assert_allclose(found.deviation, np.sqrt([2, 0.5, 2]))


def test_bad_curves_are_refused():
    with pytest.raises(InputError, match="gamma must be at least 0 and below 1, got 1"):
        smooth([1.0], 1)
    with pytest.raises(InputError, match="rule must be correct or original"):
        smooth([1.0], 0.5, rule="other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"at least two queries .* got 1 with \[2\] keys"):
        score_bound([[1, 2]])
    with pytest.raises(InputError, match=r"got 2 with \[1, 2\] keys"):
        score_bound([[1, 2], [1]])
