"""Statistics of timings against known values, and the cost model's arithmetic."""

import math

import numpy as np
import pytest

from ds4jax.experiments.timing import Cost, estimate, slower


def test_an_estimate_has_the_median_and_the_extremes():
    found = estimate([3.0, 1.0, 2.0, 10.0])
    assert (found.median, found.least, found.most, found.count) == (2.5, 1.0, 10.0, 4)
    assert found.least <= found.low <= found.median <= found.high <= found.most
    assert estimate([3.0, 1.0, 2.0, 10.0]) == found


def test_equal_values_have_no_width():
    found = estimate([2.0] * 5)
    assert (found.low, found.median, found.high) == (2.0, 2.0, 2.0)
    assert estimate([7.0]).high == 7.0


def test_the_interval_covers_the_true_median_as_often_as_it_says():
    """Of 200 samples of a skewed law; seen red with the 68 % interval.

    The bounds are four standard deviations of a binomial around 95 %.
    """
    rng = np.random.default_rng(1)
    truth = math.log(2)
    samples = rng.exponential(size=(200, 41))
    covered = sum(e.low <= truth <= e.high for e in map(estimate, samples.tolist()))
    assert 200 * 0.95 - 4 * math.sqrt(200 * 0.95 * 0.05) <= covered


def test_the_interval_is_the_standard_error_of_a_median():
    """Of many normal values: the median's deviation is sqrt(pi / 2n)."""
    values = np.random.default_rng(0).normal(size=2001)
    found = estimate(values.tolist())
    width = 2 * 1.96 * math.sqrt(math.pi / 2 / 2001)
    assert found.high - found.low == pytest.approx(width, rel=0.25)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="expected at least one, found none"):
        estimate([])


def test_a_program_is_slower_by_its_parts_medians():
    """Disturbances of rounds count for no part.

    Seen red with the median of the rounds' sums.
    """
    rival = np.full((5, 4), 1.0)
    own = np.full((5, 2), 2.06)
    for number in range(4):
        rival[number, number] += 0.4
    own[:3, 0] -= 0.01
    own[3, 1] += 5.0
    found = slower(own.tolist(), rival.tolist())
    assert found.median == pytest.approx((2.05 + 2.06) / 4 - 1)
    assert found.least <= found.low <= found.median <= found.high <= found.most
    assert found.least == pytest.approx(4.11 / 4.4 - 1)
    assert found.most == pytest.approx((2.06 + 7.06) / 4.4 - 1)
    assert found.count == 5


def test_depth_1_is_ds4s_formula():
    """(1 + alpha) / (r + d); ds4 on an M4 Max has r + d = 1.67."""
    cost = Cost(r=1.5, d=0.17)
    assert cost.speedup(1.0) == pytest.approx(2 / 1.67)
    assert cost.break_even == pytest.approx(0.67)
    assert cost.speedup(cost.break_even) == pytest.approx(1)


def test_a_chained_cycle_has_two_sure_tokens():
    """Two passes of the price of one each, free drafts, none accepted: as plain."""
    assert Cost(r=2.0, d=0.0, base=2.0).speedup(0.0) == 1
    assert Cost(r=2.0, d=0.0, base=2.0).break_even == 0
    assert Cost(r=2.0, d=0.5, base=2.0).speedup(4.0) == 6 / 2.5
