"""What a number is worth: its chance level, its null, its interval, its p adjusted for the others.

    p           share of the null at least as large, (1 + #) / (1 + R)     (Phipson and Smyth 2010)
    p adjusted  false discovery rate over a family of tests                (Benjamini and Hochberg 1995)
    interval    spread of a bootstrap over blocks of documents, 95 %       (Efron and Tibshirani 1993)

The spread is laid around the value, since a resample holds fewer different documents than the text, and
plug-in information is larger in it: that shift says nothing of how far the value may lie off.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sra_ds.intervals import without_nan

BLOCKS = 20
"""Parts of the traced text, by documents, that a bootstrap draws from."""
RESAMPLES, MANY_RESAMPLES = 100, 1000
"""Of measures that are counted again in each resample, and of those that are one product of matrices."""
PERMUTATIONS = 99
SIGNIFICANT = 0.05
"""Of an adjusted p."""

Floats = NDArray[np.float64]


class Measured(NamedTuple):
    """A value beside what it would be without structure. NaN where a part is not defined."""

    value: float
    chance: float = np.nan
    """Expected if experts were chosen independently of everything."""
    null_mean: float = np.nan
    null_95: float = np.nan
    """95th percentile of the null, its 5th where small values are remarkable; of a change that of its
    absolute values."""
    untrained: float = np.nan
    """The same measure of a router with initial weights on the same vectors."""
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    p_adjusted: float = np.nan

    def as_dict(self) -> dict[str, float | None]:
        """For JSON, which has no NaN."""
        return without_nan(self._asdict())


def measured(
    value: float, null_R: Floats, resampled_R: Floats, smaller: bool = False, **others: float
) -> Measured:
    """A value with what its null and its resamples say; `smaller`: small values are the remarkable."""
    low, high = bootstrap_interval(value, resampled_R)
    null_R = null_R[np.isfinite(null_R)]
    if not null_R.size or not np.isfinite(value):
        return Measured(value, low=low, high=high, **others)
    return Measured(
        value=value,
        null_mean=float(null_R.mean()),
        null_95=float(np.quantile(null_R, 0.05 if smaller else 0.95)),
        low=low,
        high=high,
        p=p_value(value, null_R, smaller),
        **others,
    )


def measured_change(change_U: Floats, null_R: Floats) -> Measured:
    """The mean of paired changes of U units (windows, prompts), with the interval over them; p is
    two-sided, against mean changes that had another cause."""
    value = float(change_U.mean())
    resampled_R = resampling_weights(len(change_U), MANY_RESAMPLES) @ change_U / len(change_U)
    low, high = bootstrap_interval(value, resampled_R)
    found = Measured(value, chance=0.0, low=low, high=high)
    if not null_R.size:
        return found
    return found._replace(
        null_mean=float(null_R.mean()),
        null_95=float(np.quantile(np.abs(null_R), 0.95)),
        p=p_value(abs(value), np.abs(null_R)),
    )


def p_value(value: float, null_R: Floats, smaller: bool = False) -> float:
    """One-sided p of a value against draws of its null."""
    beyond = (null_R <= value) if smaller else (null_R >= value)
    return (1 + int(beyond.sum())) / (1 + null_R.size)


def bootstrap_interval(value: float, resampled_R: Floats) -> tuple[float, float]:
    """The 95 % range of the resamples about their mean, laid around the value; NaN without resamples."""
    resampled_R = resampled_R[np.isfinite(resampled_R)]
    if not resampled_R.size or not np.isfinite(value):
        return np.nan, np.nan
    low, high = np.quantile(resampled_R - resampled_R.mean(), [0.025, 0.975])
    return float(value + low), float(value + high)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjusted p; NaN stay NaN and do not count."""
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    if tested.size:
        order = tested[np.argsort(p[tested])]
        scaled = p[order] * tested.size / np.arange(1, tested.size + 1)
        adjusted[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    return [float(p) for p in adjusted]


def draws_of_null(tests: int) -> int:
    """Draws with which one remarkable value alone stays below `SIGNIFICANT` when p is adjusted over so
    many tests: the smallest p, 1 / (1 + draws), times the tests is half of it. At least 999."""
    return max(999, round(2 * tests / SIGNIFICANT) - 1)


def with_adjusted_p(family: Sequence[Measured]) -> list[Measured]:
    """The same measurements with p adjusted over all of them."""
    adjusted = benjamini_hochberg([one.p for one in family])
    return [one._replace(p_adjusted=p) for one, p in zip(family, adjusted, strict=True)]


def block_of_documents(
    starts: NDArray[Any], tokens: int, blocks: int = BLOCKS
) -> NDArray[np.int64]:
    """Block of each document; blocks are runs of documents of about equal numbers of tokens."""
    middle: Floats = (starts + np.append(starts[1:], tokens)) / 2
    return np.minimum((middle * blocks / max(tokens, 1)).astype(np.int64), blocks - 1)


def resampling_weights(blocks: int, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """How often each resample draws each block, R x B; no resamples of fewer than two."""
    if blocks < 2:
        return np.empty((0, blocks), np.int64)
    return np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), resamples)
