"""Laws of the papers' learning rates."""

import pytest

from memlm.core.errors import InputError
from memlm.training.rates import CosineRate, InverseSqrtRate


def test_cosine_goes_from_peak_to_low_and_restarts_lower_and_longer():
    rate = CosineRate(peak=1.0, low=0.1, period=10, warmup=5, start=0.2, growth=2.0, shrink=0.5)
    assert [rate(0), rate(5)] == [0.2, 1.0]
    assert rate(10) == pytest.approx((1.0 + 0.1) / 2)
    assert [rate(15), rate(35), rate(75)] == [0.5, 0.25, 0.125]  # periods of 10, 20, 40
    assert rate(14) < rate(13) < rate(6)
    assert rate(25) == pytest.approx(0.5 * (1.0 + 0.1) / 2)
    assert CosineRate.from_dict(rate.to_dict()) == rate


def test_equal_periods():
    rate = CosineRate(peak=1.0, period=10, shrink=0.5)
    assert [rate(0), rate(10), rate(20)] == [1.0, 0.5, 0.25]


def test_inverse_square_root_halves_when_updates_are_four_times_as_many():
    rate = InverseSqrtRate(peak=0.4, warmup=100, start=0.0)
    assert [rate(0), rate(50), rate(100), rate(400)] == pytest.approx([0.0, 0.2, 0.4, 0.2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineRate(peak=0.0, period=1), "peak must be above zero, got 0.0"),
        (lambda: CosineRate(peak=1.0, period=0), "period must be at least 1 update, got 0"),
        (lambda: CosineRate(peak=1.0, period=1, low=2.0), "low must lie between 0 and peak 1.0"),
        (lambda: CosineRate(peak=1.0, period=1, growth=0.5), "growth must be at least 1"),
        (lambda: CosineRate(peak=1.0, period=1, shrink=0.0), "shrink must be above 0"),
        (lambda: CosineRate(peak=1.0, period=1, warmup=-1), "warmup must not be negative"),
        (lambda: CosineRate(peak=1.0, period=1, start=2.0), "start must lie between 0 and peak"),
        (lambda: InverseSqrtRate(peak=1.0, warmup=0), "warmup must be at least 1 update, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(InputError, match=message):
        make()
