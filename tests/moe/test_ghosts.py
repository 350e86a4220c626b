"""Ghosts in the routed layer: asleep they are not there, awake they are experts; how they are judged."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from references import (
    assert_near,
    cosine_scores_loop,
    gradients,
    leaves,
    linear_scores_loop,
    moe_loop,
    randomise,
    route_loop,
    unstack,
)
from sra_ds.config.model import MoEChannelConfig
from sra_ds.moe.ghosts import background_error, unexplained
from sra_ds.moe.layer import Given, MoELayer

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXPERTS, GHOSTS, WIDTH = 4, 2, 8
GELU = {"kind": "gelu", "hidden": 16, "dropout": 0.0}
ROUTERS: list[dict[str, Any]] = [
    {"kind": "cosine"},
    {"kind": "cosine", "temperature": "fixed", "gate": "selected"},
    {"kind": "linear", "bias": True},
    {"kind": "random"},
]
routers = pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(map(str, r.values())))


def layer_of(ghosts: int = GHOSTS, dtype: torch.dtype = torch.float64, **config: Any) -> MoELayer:
    tree = {"experts": EXPERTS, "top_k": 2, "expert": GELU, "ghosts": {"count": ghosts}, **config}
    torch.manual_seed(0)
    layer = MoELayer(TypeAdapter(MoEChannelConfig).validate_python(tree), WIDTH)
    randomise(layer, 0.5).to(dtype)
    layer.router.selection_bias_E.zero_()
    if ghosts:
        layer.router.ghost_alpha_G.zero_()
    return layer


def scores_loop(layer: MoELayer, x_TD: Tensor, awake: int) -> Tensor:
    """ln(alpha) is added to the scores of ghosts."""
    router = layer.router
    own = [router.ghost_anchor(ghost) for ghost in range(awake)]
    if hasattr(router, "anchors"):
        rows = torch.stack([*router.anchors, *own])
        scores_TS = cosine_scores_loop(x_TD, rows, router.temperature)
    else:
        bias = torch.cat([router.bias, router.bias.new_zeros(awake)])
        scores_TS = linear_scores_loop(x_TD, torch.stack([*router.weight, *own]), bias)
    shift = [0.0] * EXPERTS + router.ghost_alpha_G[:awake].double().log().tolist()
    return scores_TS + scores_TS.new_tensor(shift)


@routers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asleep_a_ghost_changes_no_bit(router: dict[str, Any], dtype: torch.dtype) -> None:
    with_them, without = layer_of(2, dtype, router=router), layer_of(0, dtype, router=router)
    without.load_state_dict(with_them.state_dict(), strict=False)
    x_TD = torch.randn(63, WIDTH, dtype=dtype)
    found = []
    for layer in (with_them, without):
        (leaf,) = leaves(x_TD)
        out_TD, facts = layer(leaf, Given(keep_scores=True))
        (out_TD.sin().sum() + facts["routing"].mean_probs_E.square().sum()).backward()
        found.append((out_TD, facts["routing"], leaf.grad, gradients(layer)))
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    for name, gradient in found[0][3].items():
        if "ghost" in name:
            assert not gradient.any(), name
        else:
            assert torch.equal(gradient, found[1][3][name]), name


@routers
@pytest.mark.parametrize("alpha", [[0.05, 0.0], [1.0, 0.3], [1.0, 1.0]])
@pytest.mark.parametrize("tokens", [1, 63, 130])
def test_awake_it_is_an_expert_with_shifted_scores(
    router: dict[str, Any], alpha: list[float], tokens: int
) -> None:
    layer = layer_of(router=router)
    layer.router.ghost_alpha_G.copy_(torch.tensor(alpha))
    awake = sum(a > 0 for a in alpha)
    (x_TD,) = leaves(torch.randn(tokens, WIDTH, dtype=torch.float64))
    weights_TD = torch.randn(tokens, WIDTH, dtype=torch.float64)
    out_TD, facts = layer(x_TD, Given(keep_scores=True))
    (out_TD * weights_TD).sum().backward()
    (again_TD,) = leaves(x_TD)
    own = {name: g for name, g in gradients(layer).items() if "router" in name}
    layer.zero_grad(set_to_none=True)
    scores_TS = scores_loop(layer, again_TD, awake)
    expected = route_loop(scores_TS, 2, layer.config.router.gate)
    networks = unstack(layer.backend.experts, layer.config.expert, WIDTH)
    for ghost in layer.ghosts:
        networks += unstack(ghost, layer.config.expert, WIDTH)
    routing = facts["routing"]
    assert torch.equal(routing.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(routing.load_E, expected.load_E)
    assert_near(routing.scores_TE, scores_TS.detach(), 1e-6)
    sum_TD = moe_loop(again_TD, expected.gates_TK, expected.expert_ids_TK, networks)
    assert_near(out_TD, sum_TD, 1e-6)  # alpha is kept in float32
    (sum_TD * weights_TD).sum().backward()
    assert_near(x_TD.grad, again_TD.grad, 1e-5)
    for name, gradient in gradients(layer).items():
        if "router" in name:
            assert_near(own[name], gradient, 1e-5)


def test_a_ghost_without_a_token_still_takes_part() -> None:
    """All processes must agree on which parameters have a gradient."""
    layer = layer_of()
    layer.router.ghost_alpha_G[0] = 1e-30
    out_TD, facts = layer(torch.randn(5, WIDTH, dtype=torch.float64))
    assert facts["routing"].load_E[EXPERTS] == 0
    out_TD.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.ghosts[0].parameters())
    assert all(p.grad is None for p in layer.ghosts[1].parameters())


def test_alpha_stays_in_float32_in_a_bf16_model() -> None:
    layer = layer_of(dtype=torch.float32)
    layer.router.ghost_alpha_G.fill_(0.123456789)
    layer.bfloat16()
    assert layer.router.ghost_alpha_G.dtype == torch.float32
    out_TD, _ = layer(torch.randn(9, WIDTH, dtype=torch.bfloat16))
    assert out_TD.isfinite().all() and out_TD.dtype == torch.bfloat16


def unexplained_loop(target_TD: Tensor, rows_TKD: Tensor) -> float:
    left, spread = 0.0, 0.0
    for target_D, rows_KD in zip(target_TD, rows_TKD, strict=True):
        fit = torch.linalg.lstsq(rows_KD.T, target_D.unsqueeze(1), driver="gelsd").solution
        left += float((target_D - rows_KD.T @ fit.squeeze(1)).square().sum())
        spread += float((target_D - target_TD.mean(0)).square().sum())
    return min(1.0, left / spread)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_what_no_expert_explains_is_the_least_squares_residual(top_k: int) -> None:
    target_TD = torch.randn(40, WIDTH, dtype=torch.float64)
    rows_TKD = torch.randn(40, top_k, WIDTH, dtype=torch.float64)
    found = unexplained(target_TD, rows_TKD)
    assert abs(float(found) - unexplained_loop(target_TD, rows_TKD)) < 1e-4
    padded = torch.cat([target_TD, 100 + target_TD]), torch.cat([rows_TKD, rows_TKD])
    assert_near(unexplained(*padded, torch.arange(80) < 40), found, 1e-9)


def test_identical_experts_are_not_saturated_and_a_span_explains_itself() -> None:
    layer = layer_of(1)
    with torch.no_grad():
        for parameter in layer.backend.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x_TD = torch.randn(50, WIDTH, dtype=torch.float64)
    _, facts = layer(x_TD, Given(mixed_TD=torch.randn_like(x_TD)))
    assert facts["apartness"].abs() < 1e-6 and facts["saturation"].abs() < 1e-6
    assert facts["unexplained"] > 0.1
    rows_TKD = torch.randn(50, 2, WIDTH, dtype=torch.float64)
    assert unexplained(rows_TKD.sum(1), rows_TKD) < 1e-4
    parallel_TKD = rows_TKD[:, :1].expand(-1, 2, -1)
    assert unexplained(parallel_TKD[:, 0], parallel_TKD) < 1e-4


def test_the_background_error_is_that_of_each_token_and_teaches_the_ghost_alone() -> None:
    guess_TD, left_TD = leaves(*torch.randn(2, 7, WIDTH, dtype=torch.float64))
    valid_T = torch.arange(7) != 3
    error = background_error(guess_TD, left_TD, valid_T)
    expected = sum(
        (guess_TD[t] - left_TD[t]).square().sum() / left_TD[t].square().sum()
        for t in range(7)
        if t != 3
    )
    assert_near(error, expected, 1e-12)
    parts = [background_error(guess_TD[p], left_TD[p]) for p in (slice(0, 3), slice(4, 7))]
    assert_near(sum(parts), error, 1e-12)  # however tokens are dealt to processes
    error.backward()
    assert left_TD.grad is None and not guess_TD.grad[3].any()


def test_only_the_next_ghost_learns_in_the_background() -> None:
    layer = layer_of(ghosts=2, compare_outputs=True).train()
    layer.config = layer.config.model_copy(
        update={"ghosts": layer.config.ghosts.model_copy(update={"background": True})}
    )
    for awake, learning in ((0, 0), (1, 1), (2, None)):
        layer.zero_grad(set_to_none=True)
        layer.router.ghost_alpha_G[:awake] = 1.0
        x_TD = torch.randn(30, WIDTH, dtype=torch.float64)
        _, facts = layer(x_TD, Given(mixed_TD=torch.randn_like(x_TD)))
        assert ("ghost" in facts["penalties"]) == (learning is not None)
        if learning is not None:
            facts["penalties"]["ghost"].backward()
        reached = {name.split(".")[1] for name, g in gradients(layer).items() if g.any()}
        assert reached == ({str(learning)} if learning is not None else set())
    layer.eval()
    layer.router.ghost_alpha_G.zero_()
    assert "penalties" not in layer(x_TD, Given(mixed_TD=x_TD))[1]
