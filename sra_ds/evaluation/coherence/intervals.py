"""Means and shares over documents with their 95 % bootstrap intervals (Efron and Tibshirani 1993).

What is drawn anew is sources: passages of one article, and what continues them, come together or not at
all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A value with its interval; NaN where there is nothing to estimate it from."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        return {
            name: float(value) if np.isfinite(value) else None
            for name, value in self._asdict().items()
        }


def mean(values: Sequence[float], sources: Sequence[int]) -> Estimate:
    """Mean of the values that are no NaN."""
    counted = np.isfinite(values)
    return share(np.where(counted, values, 0.0).tolist(), counted.tolist(), sources)


def share(
    numerators: Sequence[float], denominators: Sequence[float], sources: Sequence[int]
) -> Estimate:
    """Sum over sum; the value alone for a single source, NaN for a denominator of 0."""
    own_N = np.unique(np.asarray(sources, np.int64), return_inverse=True)[1]
    above_K, below_K = (np.bincount(own_N, part) for part in (numerators, denominators))
    if not below_K.sum() > 0:
        return Estimate(np.nan)
    value = float(above_K.sum() / below_K.sum())
    known = len(below_K)
    if known < 2:
        return Estimate(value)
    even = np.full(known, 1 / known)
    counts_RK = np.random.default_rng(0).multinomial(known, even, RESAMPLES)
    drawn_R = counts_RK @ below_K > 0
    resampled_R = (counts_RK @ above_K)[drawn_R] / (counts_RK @ below_K)[drawn_R]
    low, high = np.quantile(resampled_R, [0.025, 0.975])
    return Estimate(value, float(low), float(high))
