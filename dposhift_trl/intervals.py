"""Confidence intervals: of means and shares over pairs, and of means over seeds."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


RESAMPLES = 2000


def bootstrap_interval(values: np.ndarray) -> tuple[float, float] | None:
    """
    95% interval of a mean by the percentile bootstrap, with 2000 resamples and a fixed seed.

    Args:
        values (`np.ndarray`):
            One value per pair, in float64.

    Returns:
        `tuple[float, float]` or `None`: Ends of the interval, `None` for fewer than two values.
    """
    if len(values) < 2:
        return None
    # Each interval starts from the same seed, so that none depends on which others are computed
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=max(1, 2**20 // len(values)), method="percentile", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def share_interval(holds: np.ndarray) -> tuple[float, float] | None:
    """
    Exact 95% interval of a share (Clopper and Pearson).

    It is never of width 0: that 4 of 4 pairs agree says little, while all their resamples agree.

    Args:
        holds (`np.ndarray`):
            One truth value per pair.

    Returns:
        `tuple[float, float]` or `None`: Ends of the interval, `None` for fewer than two values.

    Example:

    ```python
    >>> [round(end, 3) for end in share_interval(np.array([True] * 4))]
    [0.398, 1.0]

    ```
    """
    if len(holds) < 2:
        return None
    interval = stats.binomtest(int(np.count_nonzero(holds)), len(holds)).proportion_ci(0.95, method="exact")
    return float(interval.low), float(interval.high)


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """
    95% interval of the mean of a few independent values, such as one per seed, by Student's t.

    Args:
        values (`Sequence[float]`):
            Values, assumed normal with an unknown standard deviation.

    Returns:
        `tuple[float, float]` or `None`: Ends of the interval, `None` for fewer than two values.

    Example:

    ```python
    >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
    [-0.484, 4.484]

    ```
    """
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half
