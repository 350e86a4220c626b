"""Which experts serve the same tokens, beside decisions that have the same loads and nothing else."""

from itertools import combinations

import numpy as np
import pytest

from sra_ds.analysis.layers import co_activation, pair_counts, swap_choices
from sra_ds.analysis.tables import Routes


def routes_of(
    experts_NK: np.ndarray, experts: int, untrained_NK: np.ndarray | None = None
) -> Routes:
    """Decisions in one block."""
    twin_NK = experts_NK if untrained_NK is None else untrained_NK
    return Routes(experts_NK, twin_NK, np.zeros(len(experts_NK), np.int64), experts)


def distinct_choices(tokens: int, shares_E: np.ndarray, top_k: int, seed: int) -> np.ndarray:
    """Independent tokens; the k experts of each drawn without replacement."""
    rng = np.random.default_rng(seed)
    scores_NE = np.log(shares_E) + rng.gumbel(size=(tokens, len(shares_E)))
    return np.argsort(-scores_NE, axis=1)[:, :top_k]


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 1), (5, 3), (4, 4)])
def test_pairs_are_counted_token_by_token(experts: int, top_k: int) -> None:
    experts_NK = distinct_choices(63, np.ones(experts), top_k, 0).astype(np.uint8)
    by_hand_EE = np.zeros((experts, experts))
    for chosen in experts_NK.tolist():
        for expert in chosen:
            by_hand_EE[expert, expert] += 1
        for a, b in combinations(chosen, 2):
            by_hand_EE[a, b] += 1
            by_hand_EE[b, a] += 1
    np.testing.assert_array_equal(pair_counts(experts_NK, experts), by_hand_EE)


def test_the_share_of_the_usual_partner() -> None:
    """Expert 0 has three tokens, two with 1; 1 has two with 0; 2 has two, one with each; 3 is idle."""
    experts_NK = np.array([[0, 1], [1, 0], [2, 0], [2, 4]])
    found = co_activation(routes_of(experts_NK, 5, untrained_NK=experts_NK[[0, 0, 0, 0]]))
    assert found.value == pytest.approx(np.mean([2 / 3, 1.0, 1 / 2, 1.0]))
    assert found.untrained == 1.0


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (7, 3), (4, 4), (300, 2)])
@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_swapping_keeps_loads_and_different_experts(tokens: int, experts: int, top_k: int) -> None:
    before_NK = distinct_choices(tokens, np.arange(1.0, experts + 1), top_k, 1).astype(np.uint16)
    kept_NK = before_NK.copy()
    after_NK = swap_choices(before_NK, np.random.default_rng(0))
    np.testing.assert_array_equal(before_NK, kept_NK)
    assert all(len(set(chosen)) == top_k for chosen in after_NK.tolist())
    np.testing.assert_array_equal(
        np.bincount(after_NK.ravel(), minlength=experts),
        np.bincount(before_NK.ravel(), minlength=experts),
    )


def test_independent_choices_are_within_the_null() -> None:
    """Even and uneven loads, many and few experts: p is uniform."""
    for experts, top_k, tokens in ((8, 2, 300), (5, 3, 130), (40, 2, 630)):
        for shares_E in (np.ones(experts), np.geomspace(20, 1, experts)):
            p_values = np.array(
                [
                    co_activation(
                        routes_of(distinct_choices(tokens, shares_E, top_k, seed), experts)
                    ).p
                    for seed in range(25)
                ]
            )
            assert 0.25 < p_values.mean() < 0.8, (experts, top_k, p_values)


def test_partners_stand_out_of_the_null() -> None:
    first_N = np.random.default_rng(0).integers(0, 4, 130)
    found = co_activation(routes_of(np.stack([2 * first_N, 2 * first_N + 1], 1), 8))
    assert found.value == 1.0 and found.p == 0.01 and found.null_95 < 0.5


def test_an_expert_of_every_token_is_nobodys_partner_beyond_chance() -> None:
    """Its load alone makes it the partner of all others; so do loads where k = E."""
    others_N = np.random.default_rng(0).integers(1, 8, 130)
    shared_NK = np.stack([np.zeros(130, np.int64), others_N], 1)
    shared_NK[::2] = shared_NK[::2, ::-1]
    every_NK = np.tile(np.arange(4), (63, 1))
    for routes in (routes_of(shared_NK, 8), routes_of(every_NK, 4)):
        found = co_activation(routes)
        assert found.p == 1.0 and found.value == pytest.approx(found.null_mean)
