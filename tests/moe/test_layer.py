"""The routed layer against a loop over equivalent networks, and recomputation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from references import (
    assert_same,
    gradients,
    leaves,
    moe_loop,
    randomise,
    stacked_gradients,
    unstack,
)
from sra_ds.config.model import FeedForwardConfig, MoEChannelConfig
from sra_ds.moe.layer import Given, MoELayer
from sra_ds.moe.routing import Routing

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXPERTS, WIDTH = 5, 8
GELU = {"kind": "gelu", "hidden": 16, "dropout": 0.0}
SWIGLU = {"kind": "swiglu", "hidden": 16, "dropout": 0.0}
SCALES: dict[str, Callable[[int], float]] = {"one": lambda k: 1, "sqrt_k": math.sqrt, "k": float}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
ROUTERS: list[dict[str, Any]] = [
    {"kind": "cosine"},
    {"kind": "cosine", "temperature": "none", "gate": "selected"},
    {"kind": "linear", "gate": "straight_through"},
    {"kind": "random"},
    {"kind": "hash"},
]

experts_of = pytest.mark.parametrize("expert", [GELU, SWIGLU], ids=["gelu", "swiglu"])
shared_with = pytest.mark.parametrize(
    "shared", [None, GELU, SWIGLU], ids=["alone", "gelu", "swiglu"]
)
routers = pytest.mark.parametrize("router", ROUTERS, ids=lambda r: "-".join(r.values()))


def layer_of(dtype: torch.dtype = torch.float64, **config: Any) -> MoELayer:
    tree = {"experts": EXPERTS, "top_k": 2, "expert": GELU, **config}
    parsed = TypeAdapter(MoEChannelConfig).validate_python(tree)
    return randomise(MoELayer(parsed, WIDTH), 0.5).to(dtype)


def parse(expert: dict[str, Any]) -> FeedForwardConfig:
    return TypeAdapter(FeedForwardConfig).validate_python(expert)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, WIDTH, dtype=dtype), torch.randint(0, 300, (tokens,))


def run(layer: MoELayer, x_TD: Tensor, ids_T: Tensor, weights_TD: Tensor, **options: Any) -> Any:
    """Forward and backward; (out_TD, routing, gradients by name)."""
    layer.zero_grad(set_to_none=True)
    (x_TD,) = leaves(x_TD)
    out_TD, facts = layer(x_TD, Given(token_ids_T=ids_T, **options))
    routing = facts["routing"]
    (out_TD * weights_TD).sum().backward()
    return out_TD.detach(), routing, {**gradients(layer), "x": x_TD.grad}


def run_loop(
    layer: MoELayer, networks: list[nn.Module], x_TD: Tensor, ids_T: Tensor, weights_TD: Tensor
) -> Any:
    """The same through separate networks."""
    layer.zero_grad(set_to_none=True)
    (x_TD,) = leaves(x_TD)
    routing = layer.router(x_TD, None, ids_T)
    gates_TK = routing.gates_TK * SCALES[layer.config.routed_scale](routing.gates_TK.shape[1])
    out_TD = moe_loop(x_TD, gates_TK, routing.expert_ids_TK, networks, layer.shared_expert)
    (out_TD * weights_TD).sum().backward()
    found = {**gradients(layer), "x": x_TD.grad}
    for name, gradient in stacked_gradients(networks).items():
        found[f"backend.experts.{name}"] = gradient
    return out_TD.detach(), found


def compare_with_loop(
    layer: MoELayer, expert: dict[str, Any], tokens: int, dtype: torch.dtype
) -> None:
    networks = unstack(layer.backend.experts, parse(expert), WIDTH)
    x_TD, ids_T = inputs(tokens, dtype)
    weights_TD = torch.randn_like(x_TD)
    out_TD, _, found = run(layer, x_TD, ids_T, weights_TD)
    expected_TD, expected = run_loop(layer, networks, x_TD, ids_T, weights_TD)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out_TD, expected_TD, rtol=tolerance, atol=tolerance)
    assert_same(found, expected, tolerance)


@experts_of
@shared_with
@routers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_and_every_gradient_equal_a_loop_over_networks(
    expert: dict[str, Any], shared: Any, router: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = layer_of(dtype, expert=expert, shared_expert=shared, router=router)
    compare_with_loop(layer, expert, 63, dtype)


@experts_of
@pytest.mark.parametrize("tokens", [1, 130])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_equals_the_loop_at_awkward_sizes(
    expert: dict[str, Any], tokens: int, top_k: int, dtype: torch.dtype
) -> None:
    compare_with_loop(layer_of(dtype, expert=expert, top_k=top_k), expert, tokens, dtype)


@experts_of
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("routed_scale", ["sqrt_k", "k"])
def test_the_layer_with_scaled_gates_equals_the_loop(
    expert: dict[str, Any], top_k: int, routed_scale: str
) -> None:
    layer = layer_of(
        expert=expert, top_k=top_k, shared_expert=GELU, routed_scale=routed_scale,
        router={"gate": "selected"},
    )  # fmt: skip
    compare_with_loop(layer, expert, 63, torch.float64)
    told_T = layer(inputs(5)[0])[1]["routing"].gates_TK.sum(-1)
    torch.testing.assert_close(told_T, torch.ones_like(told_T))


@pytest.mark.parametrize("opened", [False, True])
def test_experts_scaled_by_k_add_up_as_parts_of_one_network(opened: bool) -> None:
    layer = layer_of(
        top_k=EXPERTS, routed_scale="k", router={"kind": "hash"}, compare_outputs=opened
    )
    assert layer.opened is opened
    x_TD, ids_T = inputs(9)
    networks = unstack(layer.backend.experts, parse(GELU), WIDTH)
    expected_TD = torch.stack([network(x_TD) for network in networks]).sum(0)
    out_TD, _ = layer(x_TD, Given(token_ids_T=ids_T))
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-6, atol=1e-6)


@experts_of
@pytest.mark.parametrize(
    ("favour", "full"), [(1e6, 63), (-1e6, 0)], ids=["all_on_one", "one_empty"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_equals_the_loop_under_extreme_load(
    expert: dict[str, Any], favour: float, full: int, dtype: torch.dtype
) -> None:
    layer = layer_of(dtype, expert=expert, top_k=1)
    layer.router.selection_bias_E[2] = favour
    compare_with_loop(layer, expert, 63, dtype)
    routing = layer(inputs(63, dtype)[0])[1]["routing"]
    assert routing.load_E[2] == full


@experts_of
@shared_with
@routers
def test_recomputing_experts_changes_no_bit(
    expert: dict[str, Any], shared: Any, router: dict[str, Any]
) -> None:
    layer = layer_of(torch.float32, expert=expert, shared_expert=shared, router=router)
    x_TD, ids_T = inputs(63, torch.float32)
    weights_TD = torch.randn_like(x_TD)
    out_TD, _, kept = run(layer, x_TD, ids_T, weights_TD)
    again_TD, _, recomputed = run(layer, x_TD, ids_T, weights_TD, recompute=True)
    assert torch.equal(out_TD, again_TD)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in kept.items())


def test_recomputing_experts_draws_the_same_dropout() -> None:
    layer = layer_of(torch.float32, expert={**GELU, "dropout": 0.5}, shared_expert=GELU).train()
    x_TD, ids_T = inputs(63, torch.float32)
    weights_TD = torch.randn_like(x_TD)
    torch.manual_seed(1)
    out_TD, _, kept = run(layer, x_TD, ids_T, weights_TD)
    torch.manual_seed(1)
    again_TD, _, recomputed = run(layer, x_TD, ids_T, weights_TD, recompute=True)
    assert torch.equal(out_TD, again_TD)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in kept.items())


@routers
@pytest.mark.parametrize(("recompute", "runs"), [(False, 1), (True, 2)])
def test_the_router_runs_once_per_step_even_when_experts_run_again(
    router: dict[str, Any], recompute: bool, runs: int
) -> None:
    layer = layer_of(torch.float32, router=router).train()
    calls = {"router": 0, "experts": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    layer.router.register_forward_pre_hook(count("router"))
    layer.backend.experts.register_forward_pre_hook(count("experts"))
    x_TD, ids_T = inputs(63, torch.float32)
    run(layer, x_TD, ids_T, torch.randn_like(x_TD), recompute=recompute)
    assert calls == {"router": 1, "experts": runs}


def test_noise_cannot_change_the_route_between_forward_and_backward() -> None:
    router = {"kind": "cosine", "noise": 5.0}
    layer = layer_of(torch.float32, router=router).train()
    x_TD, ids_T = inputs(63, torch.float32)
    weights_TD = torch.randn_like(x_TD)
    torch.manual_seed(1)
    _, routing, kept = run(layer, x_TD, ids_T, weights_TD)
    torch.manual_seed(1)
    _, again, recomputed = run(layer, x_TD, ids_T, weights_TD, recompute=True)
    assert torch.equal(routing.expert_ids_TK, again.expert_ids_TK)
    assert all(torch.equal(recomputed[name], gradient) for name, gradient in kept.items())


def test_a_stub_can_stand_in_for_the_router() -> None:
    class Stub(nn.Module):
        def forward(self, x_TD: Tensor, *_: Any) -> Routing:
            ids_TK = torch.full((len(x_TD), 1), 4)
            gates_TK = torch.full((len(x_TD), 1), 2.0)
            return Routing(gates_TK, ids_TK, *[torch.zeros(())] * 4)

    layer = layer_of(torch.float32)
    layer.router = Stub()
    x_TD, _ = inputs(63, torch.float32)
    out_TD, _ = layer(x_TD)
    network = unstack(layer.backend.experts, parse(GELU), WIDTH)[4]
    torch.testing.assert_close(out_TD, 2 * network(x_TD), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_its_company() -> None:
    layer = layer_of(torch.float64).eval()
    x_TD, _ = inputs(63)
    out_TD, _ = layer(x_TD)
    alone_TD = torch.cat([layer(x_TD[t : t + 1])[0] for t in range(63)])
    torch.testing.assert_close(out_TD, alone_TD, rtol=1e-12, atol=1e-12)
