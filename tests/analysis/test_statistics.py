"""What a number is worth: p, its adjustment, intervals and the blocks they resample."""

import math

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from sra_ds.analysis.statistics import (
    Measured,
    benjamini_hochberg,
    block_of_documents,
    bootstrap_interval,
    measured,
    measured_change,
    p_value,
    resampling_weights,
    with_adjusted_p,
)

NAN = float("nan")


@pytest.mark.parametrize("tests", [1, 2, 63, 130])
def test_adjusted_p_is_scipys(tests: int) -> None:
    """With ties and the largest p there is."""
    p_values = np.round(np.random.default_rng(tests).random(tests) ** 3, 2).clip(min=0.01)
    p_values[-1] = 1.0
    np.testing.assert_allclose(benjamini_hochberg(p_values), false_discovery_control(p_values))


def test_what_was_not_tested_does_not_count() -> None:
    """NaN stays NaN and leaves the others as they would be alone."""
    adjusted = benjamini_hochberg([0.01, NAN, 0.04, 0.03, NAN])
    np.testing.assert_allclose(adjusted, [0.03, NAN, 0.04, 0.04, NAN])
    assert benjamini_hochberg([]) == [] and math.isnan(benjamini_hochberg([NAN])[0])
    family = with_adjusted_p([Measured(7.0, p=0.02), Measured(NAN), Measured(8.0, p=0.03)])
    assert [one.p_adjusted for one in family[::2]] == [pytest.approx(0.03)] * 2
    assert math.isnan(family[1].p_adjusted) and family[2].value == 8.0


def test_p_counts_what_is_as_far_out() -> None:
    """(1 + number at least as extreme) / (1 + draws), on the side that is remarkable."""
    null = np.array([1.0, 2.0, 2.0, 3.0])
    assert p_value(2.0, null) == 4 / 5
    assert p_value(9.0, null) == 1 / 5
    assert p_value(2.0, null, smaller=True) == 4 / 5
    assert p_value(0.0, null, smaller=True) == 1 / 5


def test_p_of_noise_is_uniform() -> None:
    rng = np.random.default_rng(0)
    p_values = np.array([p_value(rng.normal(), rng.normal(size=99)) for _ in range(2000)])
    for level in (0.01, 0.05, 0.5, 0.9):
        assert (p_values <= level).mean() == pytest.approx(level, abs=0.03)


def test_a_measurement_says_chance_null_and_interval() -> None:
    null = np.array([*np.arange(100.0), NAN])
    found = measured(99.5, null, np.array([90.0, 100.0, NAN]), chance=49.5, untrained=1.0)
    assert (found.value, found.chance, found.untrained) == (99.5, 49.5, 1.0)
    assert found.null_mean == 49.5 and found.null_95 == pytest.approx(94.05)
    assert found.p == 1 / 101
    assert (found.low, found.high) == (pytest.approx(94.75), pytest.approx(104.25))
    smaller = measured(99.5, null, np.empty(0), smaller=True)
    assert smaller.null_95 == pytest.approx(4.95) and smaller.p == 1.0
    assert math.isnan(smaller.low)
    untested = measured(NAN, null, np.array([1.0, 2.0]))
    assert all(math.isnan(number) for number in untested)
    assert set(untested.as_dict().values()) == {None}


def test_the_interval_is_the_spread_of_the_resamples_around_the_value() -> None:
    resampled = np.arange(1001.0)
    assert bootstrap_interval(400.0, resampled) == (pytest.approx(-75), pytest.approx(875))


def test_intervals_cover_the_truth() -> None:
    """A mean over 20 blocks whose documents are alike: about 95 % of the intervals hold it."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(600):
        sizes_B = rng.integers(5, 15, 20)
        sums_B = sizes_B * (3.0 + rng.normal(size=20)) + rng.normal(size=20)
        weights_RB = resampling_weights(20, resamples=200, seed=trial)
        low, high = bootstrap_interval(
            sums_B.sum() / sizes_B.sum(), (weights_RB @ sums_B) / (weights_RB @ sizes_B)
        )
        held += low <= 3.0 <= high
    assert 0.88 < held / 600 < 0.97


def test_resamples_draw_as_many_blocks_as_there_are() -> None:
    """Each as often as the others; and none of a text that is in one block."""
    weights_RB = resampling_weights(7, resamples=4000)
    assert weights_RB.shape == (4000, 7) and (weights_RB.sum(1) == 7).all()
    np.testing.assert_allclose(weights_RB.mean(0), 1.0, atol=0.06)
    np.testing.assert_allclose(weights_RB.var(0), 6 / 7, atol=0.1)
    assert len(resampling_weights(1)) == len(resampling_weights(0)) == 0


@pytest.mark.parametrize("documents", [1, 19, 63, 1000])
def test_blocks_are_runs_of_documents_of_about_equal_size(documents: int) -> None:
    sizes = np.random.default_rng(documents).integers(1, 60, documents)
    starts, tokens = np.cumsum([0, *sizes[:-1]]), int(sizes.sum())
    block_D = block_of_documents(starts, tokens)
    assert (np.diff(block_D) >= 0).all() and block_D[0] >= 0 and block_D[-1] <= 19
    filled_B = np.bincount(block_D, sizes, 20)
    assert np.abs(filled_B - tokens / 20).max() <= max(sizes.max(), tokens / 20)
    if documents == 1000:
        assert len(set(block_D)) == 20 and filled_B.min() > 0.9 * tokens / 20


def test_an_empty_last_document_is_in_the_last_block() -> None:
    assert block_of_documents(np.array([0, 5, 10]), 10).tolist() == [5, 15, 19]


def test_a_change_is_tested_in_both_directions() -> None:
    null = np.linspace(-0.5, 0.4, 19)
    for sign in (1.0, -1.0):
        found = measured_change(sign * np.array([0.9, 1.0, 1.1]), null)
        assert found.value == pytest.approx(sign) and found.p == 1 / 20
        assert found.low < found.value < found.high and found.chance == 0
        assert found.null_95 == pytest.approx(np.quantile(np.abs(null), 0.95))
    one = measured_change(np.array([0.3]), np.empty(0))
    assert one.value == 0.3 and np.isnan([one.low, one.high, one.p]).all()
