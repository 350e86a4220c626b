"""Shares and comparisons of the coherences of a layer's experts, against closed forms."""

import numpy as np
import pytest
from scipy.stats import binomtest

from sra_ds.analysis.profiles import coherence_over_untrained, share_above_null
from sra_ds.analysis.statistics import Measured

NAN = float("nan")


def coherences(values: list[float], null_mean: float = 0.0) -> list[Measured]:
    return [Measured(value, null_mean=null_mean, null_95=null_mean, p=0.5) for value in values]


def test_the_share_above_the_null_has_the_interval_of_a_binomial_count_and_no_p() -> None:
    found = share_above_null(coherences([1.0] * 3 + [-1.0] * 17), coherences([-1.0, 1.0]))
    assert (found.value, found.untrained, found.chance) == (0.15, 0.5, 0.05)
    interval = binomtest(3, 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == (interval.low, interval.high) and np.isnan(found.p)
    assert np.isnan(share_above_null([Measured(NAN)], []).value)


def test_experts_that_all_win_are_certainly_more_coherent() -> None:
    found = coherence_over_untrained(coherences([3.0, 4.0, 5.0, NAN]), coherences([0.0, 1.0, 2.0]))
    assert (found.value, found.chance, found.low, found.high) == (1.0, 0.5, 1.0, 1.0)
    assert found.p == pytest.approx(1 / 20)  # one of the 6! / (3! 3!) orders


def test_common_words_are_no_advantage() -> None:
    """The same excess over nulls of different height, as of words of different frequency."""
    low, high = [-0.5, -0.25, 0.0], [0.25, 0.5, 0.75]
    found = coherence_over_untrained(coherences(high, 0.5), coherences(low, -0.25))
    assert found.value == pytest.approx(0.5)


def test_equal_experts_win_half_of_the_time() -> None:
    own = coherences(np.random.default_rng(0).normal(size=64).tolist())
    found = coherence_over_untrained(own, own)
    assert found.value == 0.5 and found.low < 0.5 < found.high and found.p > 0.4
    assert np.isnan(coherence_over_untrained(own, [Measured(NAN)]).value)
