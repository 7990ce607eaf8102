"""Confidence intervals of means."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from dposhift_trl import intervals
from dposhift_trl.intervals import bootstrap_interval, share_interval, t_interval


def test_the_examples_are_right():
    assert doctest.testmod(intervals) == (0, 2)


def test_the_interval_over_seeds_is_student_s():
    values = [1.3, 0.2, 2.2, 1.9]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-12)
    assert t_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_one_value_has_no_interval():
    assert t_interval([1.0]) is None
    assert t_interval([]) is None
    assert bootstrap_interval(np.array([1.0])) is None
    assert share_interval(np.array([True])) is None


@pytest.mark.parametrize(("count", "total"), [(0, 2), (2, 2), (3, 10), (297, 300)])
def test_each_end_of_the_interval_of_a_share_leaves_one_in_40_beyond_it(count, total):
    low, high = share_interval(np.arange(total) < count)
    assert (low == 0) if count == 0 else stats.binom.sf(count - 1, total, low) == pytest.approx(0.025, rel=1e-6)
    assert (high == 1) if count == total else stats.binom.cdf(count, total, high) == pytest.approx(0.025, rel=1e-6)


def test_a_few_pairs_that_agree_are_not_told_from_chance():
    assert share_interval(np.ones(5, dtype=bool))[0] < 0.5 < share_interval(np.ones(6, dtype=bool))[0]


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 5000)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert bootstrap_interval(values) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
