"""Losses against closed forms, and the signs of their gradients."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sra_ds.config.losses import BalanceConfig, DispersionConfig, LossesConfig
from sra_ds.losses import (
    auxiliary_losses,
    balance_loss,
    dispersion_loss,
    load_share,
    total_loss,
    z_loss,
)
from sra_ds.moe.routing import Routing, route

SHARES = (0.5, 0.3, 0.2)
OF_EITHER: list[dict[str, Any]] = [
    {"kind": "cv2"},
    {"kind": "bandpass", "low": 0.25, "high": 0.4},
    {"kind": "elastic", "ceiling": 0.35},
]
OF_LOAD = [{**config, "of": "load"} for config in OF_EITHER]
balances = pytest.mark.parametrize("config", [{"kind": "switch"}, *OF_EITHER, *OF_LOAD], ids=str)


def balance(kind: str, **config: Any) -> Any:
    return TypeAdapter(BalanceConfig).validate_python({"kind": kind, "weight": 1.0, **config})


def dispersion(kind: str, **config: Any) -> Any:
    return TypeAdapter(DispersionConfig).validate_python({"kind": kind, "weight": 1.0, **config})


def routing_of(
    probs: tuple[float, ...], load: tuple[float, ...] | None = None, lse: Tensor | None = None
) -> Routing:
    """A routing with the given statistics; `mean_probs_E` is a leaf."""
    probs_E = torch.tensor(probs, dtype=torch.float64, requires_grad=True)
    load_E = torch.tensor(load or [10.0 * p for p in probs], dtype=torch.float64)
    lse_T = torch.zeros(10, dtype=torch.float64) if lse is None else lse
    empty = torch.zeros(0)
    return Routing(empty, empty, load_E, probs_E, lse_T, torch.tensor(float(len(lse_T))))


def gradient(routing: Routing, config: Any) -> Tensor:
    balance_loss(routing, config).backward()
    assert routing.mean_probs_E.grad is not None
    return routing.mean_probs_E.grad


def test_cv2_is_e_times_the_biased_variance_over_the_squared_mean() -> None:
    variance = ((0.5 - 1 / 3) ** 2 + (0.3 - 1 / 3) ** 2 + (0.2 - 1 / 3) ** 2) / 3
    expected = 3 * variance / ((1 / 3) ** 2 + 1e-8)
    loss = balance_loss(routing_of(SHARES), balance("cv2"))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_cv2_of_one_expert_taking_all_is_e_times_e_minus_one() -> None:
    loss = balance_loss(routing_of((1.0, 0.0, 0.0, 0.0)), balance("cv2"))
    assert loss.item() == pytest.approx(4 * 3, rel=1e-6)


def test_switch_is_e_times_the_product_of_load_share_and_probability() -> None:
    routing = routing_of(SHARES, load=(6.0, 3.0, 1.0))
    expected = 3 * (0.6 * 0.5 + 0.3 * 0.3 + 0.1 * 0.2)
    assert balance_loss(routing, balance("switch")).item() == pytest.approx(expected, rel=1e-12)


def test_switch_has_no_form_by_load() -> None:
    with pytest.raises(ValidationError, match="probs"):
        balance("switch", of="load")


@pytest.mark.parametrize("experts", [1, 4, 128])
@pytest.mark.parametrize("of", ["probs", "load"])
def test_an_even_layer_costs_one_for_switch_and_nothing_else(experts: int, of: str) -> None:
    even = routing_of((1 / experts,) * experts)
    assert balance_loss(even, balance("switch")).item() == pytest.approx(1.0, rel=1e-12)
    assert abs(balance_loss(even, balance("cv2", of=of)).item()) < 1e-12
    wide = {"low": 0.5 / experts, "high": 1.0, "of": of}
    assert balance_loss(even, balance("bandpass", **wide)).item() == 0
    assert balance_loss(even, balance("elastic", ceiling=1.0, of=of)).item() < 1e-12


def test_bandpass_is_the_squared_distance_from_the_corridor() -> None:
    config = balance("bandpass", low=0.25, high=0.4)
    expected = 9 * (0.1**2 + 0.05**2) / 3
    assert balance_loss(routing_of(SHARES), config).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("of", ["probs", "load"])
def test_bandpass_is_zero_inside_and_pulls_back_from_outside(of: str) -> None:
    inside = routing_of(SHARES)
    config = balance("bandpass", low=0.2, high=0.5, of=of)
    assert balance_loss(inside, config).item() == pytest.approx(0, abs=1e-30)
    assert gradient(inside, config).abs().max() < 1e-15
    outside = gradient(routing_of(SHARES), balance("bandpass", low=0.25, high=0.4, of=of))
    assert outside[0] > 0 and outside[1] == 0 and outside[2] < 0
    torch.testing.assert_close(outside, torch.tensor([0.6, 0.0, -0.3], dtype=torch.float64))


def test_elastic_is_a_spring_with_a_stop() -> None:
    config = balance("elastic", ceiling=0.35, stiffness=50.0)
    spring = ((0.5 - 1 / 3) ** 2 + (0.3 - 1 / 3) ** 2 + (0.2 - 1 / 3) ** 2) / 3
    expected = 9 * (spring + 50 * 0.15**2 / 3)
    assert balance_loss(routing_of(SHARES), config).item() == pytest.approx(expected, rel=1e-12)
    soft = balance("elastic", ceiling=0.35, stiffness=0.0)
    assert balance_loss(routing_of(SHARES), soft).item() == pytest.approx(9 * spring, rel=1e-12)


@balances
def test_descent_takes_from_full_experts_and_gives_to_empty_ones(config: dict[str, Any]) -> None:
    slope = gradient(routing_of(SHARES), balance(**config))
    assert slope[0] > slope[1] >= slope[2]
    if config["kind"] != "switch":
        assert slope[0] > 0 > slope[2]


@pytest.mark.parametrize("config", OF_EITHER, ids=lambda config: config["kind"])
def test_of_load_has_the_value_at_the_load_and_the_gradient_of_probabilities(
    config: dict[str, Any],
) -> None:
    load = (6.0, 3.0, 1.0)
    by_load = routing_of((1 / 3,) * 3, load)
    at_load = routing_of((0.6, 0.3, 0.1), load)
    mine, expected = balance(**config, of="load"), balance(**config)
    torch.testing.assert_close(balance_loss(by_load, mine), balance_loss(at_load, expected))
    torch.testing.assert_close(gradient(by_load, mine), gradient(at_load, expected))


@balances
def test_balance_reaches_the_scores_and_ignores_padding(config: dict[str, Any]) -> None:
    scores_TE = torch.randn(60, 6, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(60) < 40
    padded = balance_loss(route(scores_TE, 2, "all", valid_T), balance(**config))
    alone = balance_loss(route(scores_TE[:40], 2, "all"), balance(**config))
    torch.testing.assert_close(padded, alone, rtol=1e-12, atol=1e-12)
    padded.backward()
    assert scores_TE.grad is not None
    assert scores_TE.grad[:40].abs().max() > 0 and not scores_TE.grad[40:].any()


@balances
def test_a_layer_without_tokens_is_finite(config: dict[str, Any]) -> None:
    scores_TE = torch.randn(5, 6, requires_grad=True)
    routing = route(scores_TE, 2, "all", torch.zeros(5, dtype=torch.bool))
    loss = balance_loss(routing, balance(**config))
    loss.backward(retain_graph=True)
    assert loss.isfinite()
    assert z_loss(routing) == 0
    assert scores_TE.grad is not None and scores_TE.grad.isfinite().all()


def test_load_share_sums_to_one_or_is_empty() -> None:
    assert load_share(routing_of(SHARES, (6.0, 3.0, 1.0))).tolist() == [0.6, 0.3, 0.1]
    assert load_share(routing_of(SHARES, (0.0, 0.0, 1e-30))).sum() < 1e-20


def test_z_is_the_mean_squared_log_sum_exp_of_valid_tokens() -> None:
    scores_TE = torch.randn(60, 6, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(60) % 3 > 0
    loss = z_loss(route(scores_TE, 2, "all", valid_T))
    expected = scores_TE[valid_T].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (mine,) = torch.autograd.grad(loss, scores_TE)
    (theirs,) = torch.autograd.grad(expected, scores_TE)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_dispersions_are_means_over_pairs_of_different_anchors() -> None:
    gram_EE = torch.tensor([[1.0, 0.5, -0.2], [0.5, 1.0, 0.3], [-0.2, 0.3, 1.0]]).double()
    pairs = [0.5, -0.2, 0.3] * 2
    signed = dispersion_loss(gram_EE, dispersion("signed")).item()
    squared = dispersion_loss(gram_EE, dispersion("squared")).item()
    smooth = dispersion_loss(gram_EE, dispersion("log_mean_exp", sharpness=7.0)).item()
    assert signed == pytest.approx(sum(pairs) / 6, rel=1e-6)
    assert squared == pytest.approx(sum(c * c for c in pairs) / 6, rel=1e-6)
    assert smooth == pytest.approx(math.log(sum(math.exp(7 * c) for c in pairs) / 6) / 7, rel=1e-6)


def test_log_mean_exp_lies_between_the_mean_and_the_largest_cosine() -> None:
    units = torch.nn.functional.normalize(torch.randn(20, 8, dtype=torch.float64), dim=-1)
    gram_EE = units @ units.T
    largest = (gram_EE - 2 * torch.eye(20)).max()
    values = [
        dispersion_loss(gram_EE, dispersion("log_mean_exp", sharpness=s))
        for s in (1e-4, 1.0, 10.0, 1000.0)
    ]
    assert values == sorted(values)
    torch.testing.assert_close(
        values[0], dispersion_loss(gram_EE, dispersion("signed")), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(values[-1], largest, atol=1e-2, rtol=0)


def test_squared_dispersion_reaches_the_welch_bound_and_no_less() -> None:
    experts, width = 12, 5
    bound = (experts - width) / (width * (experts - 1))
    random = torch.nn.functional.normalize(torch.randn(experts, width, dtype=torch.float64), dim=-1)
    assert dispersion_loss(random @ random.T, dispersion("squared")) >= bound
    angles = torch.arange(3) * 2 * math.pi / 3
    triangle = torch.stack([angles.cos(), angles.sin()], -1).double()
    tight = dispersion_loss(triangle @ triangle.T, dispersion("squared"))
    assert tight.item() == pytest.approx((3 - 2) / (2 * 2), rel=1e-6)


@pytest.mark.parametrize("kind", ["signed", "squared", "log_mean_exp"])
def test_a_single_anchor_has_a_finite_dispersion(kind: str) -> None:
    assert dispersion_loss(torch.ones(1, 1), dispersion(kind)).isfinite()


@pytest.mark.parametrize("kind", ["signed", "squared", "log_mean_exp"])
def test_dispersion_leaves_the_diagonal_alone(kind: str) -> None:
    gram_EE = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    dispersion_loss(gram_EE, dispersion(kind)).backward()
    assert gram_EE.grad is not None
    assert not gram_EE.grad.diagonal().any()
    assert (gram_EE.grad != 0).sum() == 42


def losses(**config: Any) -> LossesConfig:
    return LossesConfig.model_validate(config)


def test_terms_are_means_over_layers_with_their_weights() -> None:
    first, second = routing_of(SHARES), routing_of((0.2, 0.2, 0.6))
    gram_EE = torch.eye(3, dtype=torch.float64)
    first = first._replace(anchor_gram_EE=gram_EE + 0.5, lse_T=torch.full((10,), 2.0))
    second = second._replace(anchor_gram_EE=gram_EE - 0.1, lse_T=torch.full((10,), 1.0))
    config = losses(
        balance={"kind": "cv2", "weight": 0.4},
        dispersion={"kind": "signed", "weight": 0.6},
        z_weight=0.001,
    )
    terms = auxiliary_losses([first, second], {}, config, 1)
    assert {name: weight for name, (_, weight) in terms.items()} == {
        "balance": 0.4,
        "dispersion": 0.6,
        "z": 0.001,
    }
    cv2 = [balance_loss(routing, balance("cv2")).item() for routing in (first, second)]
    assert terms["balance"][0].item() == pytest.approx(sum(cv2) / 2, rel=1e-12)
    assert terms["dispersion"][0].item() == pytest.approx((0.5 - 0.1) / 2, rel=1e-12)
    assert terms["z"][0].item() == pytest.approx((4 + 1) / 2, rel=1e-12)
    total = total_loss(torch.tensor(3.0, dtype=torch.float64), terms).item()
    assert total == pytest.approx(3 + 0.4 * sum(cv2) / 2 + 0.6 * 0.2 + 0.001 * 2.5, rel=1e-7)


def test_terms_left_out_do_not_appear() -> None:
    routing = routing_of(SHARES)
    assert auxiliary_losses([routing], {}, losses(), 1) == {}
    every = losses(
        balance={"kind": "cv2", "weight": 0.4},
        dispersion={"kind": "signed", "weight": 0.6},
        z_weight=0.1,
    )
    assert auxiliary_losses([], {}, every, 1) == {}
    assert set(auxiliary_losses([routing], {}, every, 1)) == {
        "balance",
        "z",
    }  # no anchors, no dispersion
    assert total_loss(torch.tensor(3.0), {}) == 3


def test_penalties_are_sums_over_tokens_and_means_over_layers() -> None:
    config = LossesConfig(ponder_weight=0.5, memory_weight=0.0)
    sums = {"ponder": [torch.tensor(12.0), torch.tensor(18.0)], "memory": [torch.tensor(1.0)]}
    assert auxiliary_losses([], sums, config, 10) == {"ponder": (torch.tensor(1.5), 0.5)}
