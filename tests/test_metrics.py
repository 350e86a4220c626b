"""Summaries of routing against closed forms."""

import math

import pytest
import torch

from sra_ds.metrics import (
    HISTOGRAM_EDGES,
    anchor_drift,
    is_dead,
    load_histogram,
    load_summary,
)
from sra_ds.moe.routing import route
from sra_ds.training.processes import over_ranks


def test_without_other_processes_the_statistics_are_returned_as_they_are() -> None:
    scores_TE = torch.randn(20, 4, requires_grad=True)
    routings = [route(scores_TE, 2, "all"), route(2 * scores_TE, 1, "selected")]
    found = over_ranks(routings)
    assert len(found) == 2
    assert all(mine is theirs for mine, theirs in zip(found, routings, strict=True))
    assert over_ranks([]) == []


def test_the_two_published_definitions_of_a_dead_expert_differ_by_k() -> None:
    tokens, top_k = 1_000_000, 2
    load_E = torch.tensor([99.0, 100.0, 150.0, 199.0, 200.0, 0.0])
    load_E = torch.cat([load_E, torch.tensor([top_k * tokens - float(load_E.sum())])])
    assert is_dead(load_E).tolist() == [True] * 4 + [False, True, False]
    assert is_dead(load_E, tokens).tolist() == [True] + [False] * 4 + [True, False]
    assert torch.equal(is_dead(load_E.expand(3, -1)), is_dead(load_E).expand(3, -1))
    summary = load_summary(load_E, tokens)
    assert (summary["dead_by_routes"], summary["dead_by_tokens"]) == (5, 2)


@pytest.mark.parametrize("experts", [1, 4, 128])
def test_an_even_load_has_no_spread_and_uses_every_expert(experts: int) -> None:
    summary = load_summary(torch.full((experts,), 500.0), 500.0 * experts)
    assert summary["dead_by_routes"] == summary["dead_by_tokens"] == 0
    assert summary["load_cv"] == pytest.approx(0, abs=1e-12)
    assert summary["max_violation"] == pytest.approx(0, abs=1e-12)
    assert summary["min_share"] == summary["max_share"] == pytest.approx(1 / experts)
    assert summary["effective_experts"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_a_collapsed_load_uses_one_expert(experts: int) -> None:
    load_E = torch.zeros(experts)
    load_E[experts // 2] = 1000.0
    summary = load_summary(load_E, 1000.0)
    assert summary["dead_by_routes"] == summary["dead_by_tokens"] == experts - 1
    assert summary["load_cv"] == pytest.approx(math.sqrt(experts - 1), rel=1e-12)
    assert summary["max_violation"] == pytest.approx(experts - 1, rel=1e-12)
    assert (summary["min_share"], summary["max_share"]) == (0.0, 1.0)
    assert summary["effective_experts"] == pytest.approx(1 / experts, rel=1e-12)


def test_a_mixed_load_equals_its_closed_form() -> None:
    summary = load_summary(torch.tensor([6.0, 3.0, 1.0, 0.0]), 5.0)
    shares = (0.6, 0.3, 0.1)
    entropy = -sum(p * math.log(p) for p in shares)
    variance = (3.5**2 + 0.5**2 + 1.5**2 + 2.5**2) / 4
    assert summary["load_cv"] == pytest.approx(math.sqrt(variance) / 2.5, rel=1e-12)
    assert summary["max_violation"] == pytest.approx(6 / 2.5 - 1, rel=1e-12)
    assert summary["effective_experts"] == pytest.approx(math.exp(entropy) / 4, rel=1e-12)
    assert summary["dead_by_routes"] == summary["dead_by_tokens"] == 1
    assert (summary["min_share"], summary["max_share"]) == (0.0, pytest.approx(0.6))


def test_no_load_at_all_is_finite() -> None:
    assert all(math.isfinite(value) for value in load_summary(torch.zeros(4), 0.0).values())


def test_padding_changes_no_summary() -> None:
    scores_TE = torch.randn(80, 6)
    valid_T = torch.arange(80) < 60
    padded, alone = route(scores_TE, 2, "all", valid_T), route(scores_TE[:60], 2, "all")
    assert load_summary(padded.load_E, 60.0) == load_summary(alone.load_E, 60.0)


@pytest.mark.parametrize("experts", [1, 4, 130])
def test_an_even_load_is_in_the_bin_that_ends_at_the_mean(experts: int) -> None:
    histogram = load_histogram(torch.full((experts,), 7.0))
    assert len(histogram) == len(HISTOGRAM_EDGES) + 1
    assert histogram[HISTOGRAM_EDGES.index(1.0)] == 1.0 and sum(histogram) == 1.0


def test_the_histogram_of_a_collapsed_load_has_its_two_ends() -> None:
    histogram = load_histogram(torch.tensor([0.0, 0.0, 900.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    assert histogram == [7 / 8, *[0.0] * (len(HISTOGRAM_EDGES) - 1), 1 / 8]


def test_each_bin_of_the_histogram_holds_its_upper_bound_and_nothing_below() -> None:
    """Fourteen experts with a mean load of 128: one on every bound, three inside a bin, one above all."""
    load_E = torch.tensor([*(128 * edge for edge in HISTOGRAM_EDGES), 3.0, 65.0, 129.0, 573.0])
    assert load_E.mean() == 128
    counts = [round(14 * share) for share in load_histogram(load_E)]
    assert counts == [1, 1, 2, 1, 1, 1, 1, 2, 2, 1, 1]


def test_no_load_at_all_is_in_the_first_bin() -> None:
    assert load_histogram(torch.zeros(5))[0] == 1.0


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, math.pi])
def test_drift_is_one_minus_the_cosine_of_a_known_rotation(angle: float) -> None:
    start_ED = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]], dtype=torch.float64)
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    assert anchor_drift(3 * start_ED @ turn.T, start_ED) == pytest.approx(1 - math.cos(angle))


def test_drift_is_the_mean_over_experts_and_exactly_zero_at_the_start() -> None:
    start_ED = torch.randn(7, 33)
    assert anchor_drift(start_ED, start_ED.clone()) == 0.0
    turned_ED = torch.cat([-start_ED[:2], start_ED[2:]])
    assert anchor_drift(turned_ED, start_ED) == pytest.approx(2 * 2 / 7)
