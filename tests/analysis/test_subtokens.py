"""Whether the pieces of a word stay together."""

import math

import numpy as np
import pytest

from sra_ds.analysis.subtokens import (
    jaccard,
    neighbours_within_words,
    same_first_choice,
    subtoken_coherence,
)
from sra_ds.analysis.tables import Routes


def routes_of(experts_NK: np.ndarray, experts: int) -> Routes:
    """Decisions in ten blocks, whose untrained twin decides the other way round."""
    tokens = len(experts_NK)
    return Routes(experts_NK, experts_NK[::-1], np.arange(tokens) * 10 // tokens, experts)


def test_neighbours_are_pieces_of_one_word() -> None:
    """Not white space, which has no word, and not the end of one word and the begin of the next."""
    assert neighbours_within_words(np.array([-1, -1, 0, 0, 0, 1, 2, 2, -1])).tolist() == [2, 3, 6]
    assert neighbours_within_words(np.array([4])).tolist() == []


def test_agreement_and_overlap_by_hand() -> None:
    a_SK = np.array([[0, 1], [0, 1], [0, 1], [2, 1]])
    b_SK = np.array([[0, 1], [1, 0], [0, 2], [3, 0]])
    assert same_first_choice(a_SK, b_SK).tolist() == [1, 0, 1, 0]
    assert jaccard(a_SK, b_SK).tolist() == [1, 1, pytest.approx(1 / 3), 0]
    assert jaccard(a_SK[:, :1], b_SK[:, :1]).tolist() == [1, 0, 1, 0]


def test_words_that_stay_together_stand_out() -> None:
    """Every word of three pieces has an expert of its own; chance is the sum of squared loads."""
    expert_W = np.random.default_rng(0).choice(5, 210, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    expert_N = np.repeat(expert_W, 3)
    routes = routes_of(np.stack([expert_N, (expert_N + 1) % 5], 1), 5)
    found = subtoken_coherence(neighbours_within_words(np.arange(630) // 3), routes)
    for one in found.values():
        assert one.value == one.untrained == one.low == one.high == 1.0
        assert one.p == 0.01 and one.null_95 < 0.6
    share_E = np.bincount(expert_N, minlength=5) / 630
    agreement = found["subtoken_agreement"]
    assert agreement.chance == pytest.approx((share_E**2).sum())
    assert agreement.null_mean == pytest.approx(agreement.chance, abs=0.01)


def test_independent_pieces_are_within_the_null() -> None:
    p_values = []
    for seed in range(40):
        experts_NK = np.random.default_rng(seed).integers(0, 5, (630, 1))
        pairs = neighbours_within_words(np.arange(630) // 3)
        found = subtoken_coherence(pairs, routes_of(experts_NK, 5))
        p_values.append(found["subtoken_agreement"].p)
        assert found["subtoken_overlap"].value == found["subtoken_agreement"].value  # k = 1
    assert 0.35 < np.mean(p_values) < 0.65


def test_a_text_of_whole_words_has_nothing_to_measure() -> None:
    found = subtoken_coherence(np.empty(0, np.int64), routes_of(np.zeros((63, 2), np.int64), 5))
    assert all(math.isnan(number) for one in found.values() for number in one)
