"""Confidence intervals of means."""

import doctest
import math

import numpy as np
import pytest
from scipy import stats

from dposhift_trl import intervals
from dposhift_trl.intervals import bootstrap_interval, t_interval


def test_the_examples_are_right():
    assert doctest.testmod(intervals) == (0, 1)


def test_the_interval_over_seeds_is_student_s():
    values = [1.3, 0.2, 2.2, 1.9]
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(expected, rel=1e-12)
    assert t_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_one_value_has_no_interval():
    assert t_interval([1.0]) is None
    assert t_interval([]) is None
    assert bootstrap_interval(np.array([1.0])) is None


def test_the_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, 5000)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert bootstrap_interval(values) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1 * error)
