"""Values with 95 % intervals: over sources of text, and over the seeds of what was trained.

    share     a sum over a sum: percentiles of bootstrap resamples of sources  (Efron and Tibshirani 1993)
    paired    by how much one loss is above another, over documents and seeds: its half width is
              sqrt(t(S - 1)^2 SD^2 / S + t(K - 1)^2 V), SD over seeds, V the variance over resampled
              documents. Degrees of freedom estimated for the sum would make it too narrow for few seeds.

A source is drawn anew as a whole: a document, or an article with all its passages. Letters: S
seeds, K sources, R resamples.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

RESAMPLES = 1000
Array = NDArray[Any]


class Estimate(NamedTuple):
    """A value with its interval; NaN where there is nothing to estimate it from."""

    value: float
    low: float = np.nan
    high: float = np.nan

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        return without_nan(self._asdict())


def without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is not finite."""
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def mean(values: Sequence[float], sources: Sequence[int]) -> Estimate:
    """Mean of the values that are no NaN."""
    counted = np.isfinite(values)
    return share(np.where(counted, values, 0.0), counted, sources)


def share(
    numerators: Sequence[float] | Array,
    denominators: Sequence[float] | Array,
    sources: Sequence[int] | Array | None = None,
) -> Estimate:
    """Sum over sum; the value alone where a single source has anything below the line, NaN where none
    has. Without `sources` each part is one."""
    if sources is None:
        sources = np.arange(len(numerators))
    own_N = np.unique(np.asarray(sources, np.int64), return_inverse=True)[1]
    above_K, below_K = (np.bincount(own_N, part) for part in (numerators, denominators))
    if not below_K.sum() > 0:
        return Estimate(np.nan)
    value = float(above_K.sum() / below_K.sum())
    if (below_K > 0).sum() < 2:
        return Estimate(value)
    low, high = np.quantile(_resampled(above_K, below_K), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def paired(losses_SK: Array, others_SK: Array, tokens_K: Array) -> Estimate:
    """Nats per token by which the first losses (sums over documents, a row per seed, paired by row) are
    above the second. One seed says nothing of others: its interval is over documents alone."""
    apart_SK = np.asarray(losses_SK, np.float64) - np.asarray(others_SK, np.float64)
    seeds, documents = apart_SK.shape
    if seeds < 2 or documents < 2:
        return share(apart_SK.mean(0), tokens_K)
    value = float(apart_SK.mean(0).sum() / tokens_K.sum())
    by_seed = float((apart_SK.sum(1) / tokens_K.sum()).var(ddof=1) / seeds)
    by_document = float(_resampled(apart_SK.mean(0), tokens_K).var())
    of_seeds, of_documents = (float(t.ppf(0.975, count - 1)) for count in (seeds, documents))
    half = (of_seeds**2 * by_seed + of_documents**2 * by_document) ** 0.5
    return Estimate(value, value - half, value + half)


def _resampled(above_K: Array, below_K: Array) -> NDArray[np.float64]:
    """The share in each resample of the sources that has anything below the line."""
    known = len(below_K)
    counts_RK = np.random.default_rng(0).multinomial(known, np.full(known, 1 / known), RESAMPLES)
    counts_RK = counts_RK[counts_RK @ below_K > 0]
    resampled_R: NDArray[np.float64] = (counts_RK @ above_K) / (counts_RK @ below_K)
    return resampled_R
