"""Intervals against closed forms, and against how often they hold what they should."""

import numpy as np
import pytest
from scipy.stats import t

from sra_ds.intervals import RESAMPLES, mean, paired, share

TOKENS = np.array([10, 40, 25, 100, 5])


def test_seeds_alone_give_students_interval() -> None:
    by_seed = np.array([0.10, 0.16, 0.07])  # nats per token, the same in every document
    found = paired(by_seed[:, None] * TOKENS, np.zeros((3, 5)), TOKENS)
    half = t.ppf(0.975, 2) * by_seed.std(ddof=1) / np.sqrt(3)
    assert found.value == pytest.approx(by_seed.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_documents_alone_give_that_of_their_mean() -> None:
    apart_K = np.random.default_rng(0).normal(0.1, 1.0, 60)
    found = paired(np.stack([apart_K] * 3), np.zeros((3, 60)), np.ones(60))
    error = apart_K.std() / np.sqrt(60)  # what a bootstrap of a mean tends to
    assert found.value == pytest.approx(apart_K.mean())
    assert found.high - found.value == pytest.approx(t.ppf(0.975, 59) * error, rel=0.1)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 0.1, 0.3, 1.0, 3.0])
def test_new_seeds_and_documents_lie_within_at_least_as_often_as_said(
    seeds: int, of_seeds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two differ more; 0.936 is 2 standard errors below 0.95."""
    monkeypatch.setattr("sra_ds.intervals.RESAMPLES", 200)
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        truth_K = 0.3 + 3.0 * rng.normal(size=30)
        apart_SK = truth_K + of_seeds * rng.normal(size=(seeds, 1))
        apart_SK = apart_SK + 0.1 * rng.normal(size=(seeds, 30))
        found = paired(apart_SK, np.zeros((seeds, 30)), np.ones(30))
        held += found.low <= 0.3 <= found.high
    assert held >= 936


def test_one_seed_is_an_interval_over_documents() -> None:
    losses_K = np.random.default_rng(0).gamma(2.0, size=5) * TOKENS
    found = paired(losses_K[None], np.zeros((1, 5)), TOKENS)
    assert found == share(losses_K, TOKENS)
    assert found.low < found.value < found.high


def test_a_single_source_that_has_anything_has_no_interval() -> None:
    found = mean([0.5, np.nan, np.nan], [0, 1, 2])
    assert found.value == 0.5 and np.isnan(found.low) and np.isnan(found.high)
    assert mean([0.5, 0.7, np.nan], [0, 1, 2]).low == 0.5


def test_equal_losses_differ_by_nothing() -> None:
    losses_SK = np.random.default_rng(0).gamma(2.0, size=(3, 5))
    assert paired(losses_SK, losses_SK, TOKENS) == (0.0, 0.0, 0.0)


def test_a_share_is_the_bootstrap_of_a_sum_over_a_sum() -> None:
    above_K = np.random.default_rng(0).gamma(2.0, size=5)
    rng = np.random.default_rng(0)
    resampled = []
    for counts_K in rng.multinomial(5, np.full(5, 0.2), RESAMPLES):
        drawn = np.repeat(np.arange(5), counts_K)
        resampled.append(above_K[drawn].sum() / TOKENS[drawn].sum())
    expected = (above_K.sum() / TOKENS.sum(), *np.quantile(resampled, [0.025, 0.975]))
    assert share(above_K, TOKENS) == pytest.approx(expected)
