"""Summaries of routing against closed forms."""

import math

import pytest
import torch

from sra_ds.metrics import dead_experts, load_summary
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
    assert dead_experts(load_E, tokens) == {"by_routes": 5, "by_tokens": 2}


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
