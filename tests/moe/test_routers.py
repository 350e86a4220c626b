"""Every router against a loop over tokens and experts, and what routers must never do."""

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from references import (
    LoopRouting,
    cosine_scores_loop,
    gradients,
    hash_ids_loop,
    leaves,
    linear_scores_loop,
    randomise,
    route_loop,
)
from sra_ds.config.model import AnyRouterConfig
from sra_ds.moe.routers import build_router
from sra_ds.moe.routing import Routing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TOKENS, WIDTH, EXPERTS = 17, 8, 5
GATES = ["selected", "all", "straight_through"]

COSINE = [
    {"kind": "cosine", "temperature": temperature, "gate": gate, "initial_temperature": 3.0}
    for temperature in ("none", "fixed", "global", "per_expert")
    for gate in GATES
]
LINEAR = [
    {"kind": "linear", "bias": bias, "gate": gate} for bias in (False, True) for gate in GATES
]
RANDOM = [{"kind": "random", "temperature": 3.0, "gate": gate} for gate in GATES]
SCORING = COSINE + LINEAR + RANDOM


def name(config: dict[str, Any]) -> str:
    return "-".join(str(value) for value in config.values())


def router_of(config: dict[str, Any], top_k: int = 2) -> Any:
    """A float64 router in evaluation mode, random parameters, temperatures of both signs."""
    parsed = TypeAdapter(AnyRouterConfig).validate_python(config)
    router = randomise(build_router(parsed, WIDTH, EXPERTS, top_k)).double().eval()
    if isinstance(getattr(router, "temperature", None), nn.Parameter):
        signs = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0])[: len(router.temperature)]
        router.temperature.data = (signs * torch.rand(len(signs)) * 4 + signs).double()
    return router


def tokens_TD(tokens: int = TOKENS) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)


def scores_loop(router: Any, x_TD: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    if router.config.kind == "linear":
        return linear_scores_loop(x_TD, parameters["weight"], parameters.get("bias"))
    buffers = dict(router.named_buffers())
    anchors_ED = parameters.get("anchors", buffers.get("anchors"))
    temperature = parameters.get("temperature", buffers.get("temperature"))
    return cosine_scores_loop(x_TD, anchors_ED, temperature)


def weighted_sum(routing: Routing | LoopRouting, weights: list[Tensor]) -> Tensor:
    facts = (routing.gates_TK, routing.mean_probs_E, routing.lse_T)
    return sum((fact * w).sum() for fact, w in zip(facts, weights, strict=True))


scoring = pytest.mark.parametrize("config", SCORING, ids=name)
one_of_each = pytest.mark.parametrize(
    "config", [COSINE[7], COSINE[10], LINEAR[4], RANDOM[1]], ids=name
)


@scoring
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_router_and_every_gradient_equal_the_loop(config: dict[str, Any], top_k: int) -> None:
    router = router_of(config, top_k)
    router.selection_bias_E.normal_()
    valid_T = torch.arange(TOKENS) % 4 != 2
    x_TD, loop_x_TD = leaves(*[tokens_TD()] * 2)
    named = dict(router.named_parameters())
    loop_parameters = dict(zip(named, leaves(*named.values()), strict=True))

    routing = router(x_TD, valid_T, keep_scores=True)
    loop_scores_TE = scores_loop(router, loop_x_TD, loop_parameters)
    selection_TE = loop_scores_TE.detach() + router.selection_bias_E
    expected = route_loop(loop_scores_TE, top_k, config["gate"], valid_T, selection_TE)

    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(routing.scores_TE, loop_scores_TE, **near)
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.load_E, expected.load_E)
    assert routing.valid_count == expected.valid_count
    for fact in ("gates_TK", "mean_probs_E", "lse_T"):
        torch.testing.assert_close(getattr(routing, fact), getattr(expected, fact), **near)

    weights = [torch.randn_like(expected.gates_TK), torch.randn(EXPERTS).double()]
    weights.append(torch.randn(TOKENS).double())
    weighted_sum(routing, weights).backward()
    weighted_sum(expected, weights).backward()
    torch.testing.assert_close(x_TD.grad, loop_x_TD.grad, **near)
    for parameter, gradient in gradients(router).items():
        torch.testing.assert_close(gradient, loop_parameters[parameter].grad, **near)
        assert gradient.any(), parameter


@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
def test_hash_router_equals_the_loop(top_k: int) -> None:
    router = router_of({"kind": "hash"}, top_k)
    token_ids_T = torch.cat([torch.arange(60), torch.tensor([31_999, 65_535, 2**31 - 1])])
    valid_T = torch.arange(63) % 4 != 2
    routing = router(tokens_TD(63), valid_T, token_ids_T)
    ids = hash_ids_loop(token_ids_T.tolist(), EXPERTS, top_k)
    assert routing.expert_ids_TK.tolist() == ids
    assert (routing.gates_TK == 1 / top_k).all()
    counted = torch.tensor(ids)[valid_T].flatten()
    assert torch.equal(routing.load_E.long(), torch.bincount(counted, minlength=EXPERTS))
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(
        routing.mean_probs_E, torch.full((EXPERTS,), 0.2, dtype=torch.float64), **near
    )
    torch.testing.assert_close(routing.lse_T, valid_T.double() * math.log(EXPERTS), **near)
    assert routing.valid_count == valid_T.sum()


def test_hash_router_spreads_tokens_and_looks_at_ids_only() -> None:
    router = router_of({"kind": "hash"}, 2)
    token_ids_T = torch.arange(4000)
    first = router(tokens_TD(4000), None, token_ids_T)
    second = router(tokens_TD(4000), None, token_ids_T)
    assert torch.equal(first.expert_ids_TK, second.expert_ids_TK)
    assert (first.load_E / first.load_E.mean() - 1).abs().max() < 0.1
    with pytest.raises(ValueError, match="token_ids_T"):
        router(tokens_TD())


@pytest.mark.parametrize("config", [*COSINE, *RANDOM], ids=name)
def test_the_length_of_tokens_and_anchors_changes_nothing(config: dict[str, Any]) -> None:
    router, x_TD = router_of(config), tokens_TD(63)
    base = router(x_TD, keep_scores=True)
    scaled = [router(7 * x_TD, keep_scores=True)]
    router.anchors.data *= 7
    scaled.append(router(x_TD, keep_scores=True))
    for other in scaled:
        assert torch.equal(other.expert_ids_TK, base.expert_ids_TK)
        torch.testing.assert_close(other.scores_TE, base.scores_TE, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.gates_TK, base.gates_TK, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", COSINE, ids=name)
def test_scores_equal_torch_cosine_similarity(config: dict[str, Any]) -> None:
    router, x_TD = router_of(config), tokens_TD()
    cosines_TE = torch.cosine_similarity(x_TD[:, None], router.anchors[None], dim=-1)
    expected_TE = router.temperature.abs() * cosines_TE
    scores_TE = router(x_TD, keep_scores=True).scores_TE
    torch.testing.assert_close(scores_TE, expected_TE, rtol=1e-12, atol=1e-12)


def test_zero_and_tiny_vectors_stay_finite() -> None:
    router = router_of(COSINE[7])
    (x_TD,) = leaves(torch.cat([torch.zeros(3, WIDTH), torch.full((3, WIDTH), 1e-30)]).double())
    routing = router(x_TD)
    (routing.gates_TK.square().sum() + routing.lse_T.sum()).backward()
    assert routing.gates_TK.isfinite().all()
    assert x_TD.grad is not None and x_TD.grad.isfinite().all()
    assert router.anchors.grad.isfinite().all()


@scoring
def test_padding_changes_no_statistic(config: dict[str, Any]) -> None:
    router, x_TD = router_of(config), tokens_TD(63)
    valid_T = torch.rand(63) < 0.6
    other_TD = torch.where(valid_T[:, None], x_TD, 100 * tokens_TD(63))
    base, other, alone = router(x_TD, valid_T), router(other_TD, valid_T), router(x_TD[valid_T])
    assert torch.equal(base.load_E, other.load_E)
    assert torch.equal(base.load_E, alone.load_E)
    assert base.valid_count == alone.valid_count == valid_T.sum()
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(base.mean_probs_E, other.mean_probs_E, **near)
    torch.testing.assert_close(base.mean_probs_E, alone.mean_probs_E, **near)
    torch.testing.assert_close(base.lse_T.square().sum(), alone.lse_T.square().sum(), **near)
    torch.testing.assert_close(base.lse_T, other.lse_T, **near)


@one_of_each
def test_noise_acts_on_the_selection_while_training_only(config: dict[str, Any]) -> None:
    x_TD = tokens_TD(130)
    quiet, noisy = router_of(config), router_of({**config, "noise": 5.0})
    noisy.load_state_dict(quiet.state_dict())
    assert torch.equal(noisy(x_TD).expert_ids_TK, quiet(x_TD).expert_ids_TK)
    clean, trained = quiet.train()(x_TD), noisy.train()(x_TD, keep_scores=True)
    assert not torch.equal(trained.expert_ids_TK, clean.expert_ids_TK)
    assert torch.equal(trained.mean_probs_E, clean.mean_probs_E)
    assert torch.equal(trained.lse_T, clean.lse_T)
    probs_TK = trained.scores_TE.softmax(-1).gather(-1, trained.expert_ids_TK)
    expected_TK = probs_TK / (probs_TK.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(trained.gates_TK, expected_TK, rtol=1e-9, atol=1e-9)


@one_of_each
def test_selection_bias_moves_the_choice_and_nothing_else(config: dict[str, Any]) -> None:
    router, x_TD = router_of(config), tokens_TD(63)
    clean = router(x_TD, keep_scores=True)
    router.selection_bias_E[3] = 1e6
    biased = router(x_TD, keep_scores=True)
    assert (biased.expert_ids_TK[:, 0] == 3).all() and biased.load_E[3] == 63
    assert torch.equal(biased.scores_TE, clean.scores_TE)
    assert torch.equal(biased.mean_probs_E, clean.mean_probs_E)
    probs_TK = clean.scores_TE.softmax(-1).gather(-1, biased.expert_ids_TK)
    expected_TK = probs_TK / (probs_TK.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(biased.gates_TK, expected_TK, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half])
@one_of_each
def test_selection_bias_stays_float32_to_the_bit_when_the_model_is_cast(
    config: dict[str, Any], cast: Any
) -> None:
    router = router_of(config).float()
    router.selection_bias_E.copy_(torch.tensor([0.001, 0.003, -0.007, 1.0001, 0.0]))
    before_E = router.selection_bias_E.clone()
    cast(router)
    assert router.selection_bias_E.dtype == torch.float32
    assert torch.equal(router.selection_bias_E, before_E)
    assert "selection_bias_E" in router.state_dict()


@one_of_each
@pytest.mark.parametrize("how", ["cast", "autocast"])
def test_routing_is_float32_for_bf16_tokens(config: dict[str, Any], how: str) -> None:
    router = router_of(config).float()
    x_TD = tokens_TD(63).bfloat16()
    if how == "cast":
        router.bfloat16()
        routing = router(x_TD, keep_scores=True)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            routing = router(x_TD, keep_scores=True)
    exact = router.double()(x_TD.double(), keep_scores=True)
    for fact in ("scores_TE", "gates_TK", "mean_probs_E", "lse_T", "load_E"):
        assert getattr(routing, fact).dtype == torch.float32
        mine, theirs = getattr(routing, fact).double(), getattr(exact, fact)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(routing.expert_ids_TK, exact.expert_ids_TK)


@scoring
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_pass_changes_no_state(config: dict[str, Any], training: bool) -> None:
    router = router_of({**config, "noise": 0.3}).train(training)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    router(tokens_TD())
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())


@pytest.mark.parametrize("temperature", ["none", "fixed", "global", "per_expert"])
def test_temperature_is_saved_with_the_weights(temperature: str) -> None:
    config = {"kind": "cosine", "temperature": temperature, "initial_temperature": 4.0}
    router = router_of(config)
    assert "temperature" in router.state_dict()
    learned = "temperature" in dict(router.named_parameters())
    assert learned == (temperature in ("global", "per_expert"))
    assert len(router.temperature) == (EXPERTS if temperature == "per_expert" else 1)
    fact = router(tokens_TD()).temperature
    assert not fact.requires_grad
    torch.testing.assert_close(fact, router.temperature.detach().abs().mean())


@one_of_each
def test_scores_are_kept_only_when_asked_for(config: dict[str, Any]) -> None:
    router = router_of(config)
    assert router(tokens_TD()).scores_TE is None
    assert router(tokens_TD(), keep_scores=True).scores_TE.shape == (TOKENS, EXPERTS)


def test_top_k_can_change_between_steps() -> None:
    router = router_of(COSINE[7], 1)
    assert router(tokens_TD()).expert_ids_TK.shape == (TOKENS, 1)
    router.top_k = 3
    assert router(tokens_TD()).expert_ids_TK.shape == (TOKENS, 3)
