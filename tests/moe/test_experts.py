"""Stacked experts against separate networks."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from references import assert_same, gradients, leaves, randomise, stacked_gradients, unstack
from sra_ds.config.model import FeedForwardConfig
from sra_ds.layers import ResidualLinear
from sra_ds.moe.experts import build_experts, build_feed_forward

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXPERTS, WIDTH, HIDDEN = 5, 8, 16
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
KINDS: list[dict[str, Any]] = [
    {"kind": "gelu", "hidden": HIDDEN, "dropout": 0.0},
    {"kind": "gelu", "hidden": HIDDEN, "dropout": 0.0, "bias": False},
    {"kind": "swiglu", "hidden": HIDDEN, "dropout": 0.0},
]

kinds = pytest.mark.parametrize("kind", KINDS, ids=["gelu", "gelu-no-bias", "swiglu"])


def parse(kind: dict[str, Any]) -> FeedForwardConfig:
    return TypeAdapter(FeedForwardConfig).validate_python(kind)


def groups(rows: int, load: str) -> tuple[Tensor, Tensor]:
    """(counts_E, expert_of_row_R)."""
    expert_R = torch.randint(EXPERTS, (rows,)).sort().values
    if load == "one_empty":
        expert_R = expert_R.where(expert_R != 2, 3)
    if load == "all_on_one":
        expert_R = torch.zeros(rows, dtype=torch.int64)
    return torch.bincount(expert_R, minlength=EXPERTS).to(torch.int32), expert_R


@kinds
@pytest.mark.parametrize("rows", [1, 63, 130])
@pytest.mark.parametrize("load", ["mixed", "one_empty", "all_on_one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_every_gradient_equal_separate_networks(
    kind: dict[str, Any], rows: int, load: str, dtype: torch.dtype
) -> None:
    config = parse(kind)
    experts = randomise(build_experts(config, range(EXPERTS), WIDTH), 0.5).to(dtype)
    networks = unstack(experts, config, WIDTH)
    counts_E, expert_R = groups(rows, load)
    x_RD, loop_x_RD = leaves(*[torch.randn(rows, WIDTH, dtype=dtype)] * 2)
    y_RD = experts(x_RD, counts_E)
    loop_y_RD = torch.stack([networks[int(e)](x) for x, e in zip(loop_x_RD, expert_R, strict=True)])
    weights_RD = torch.randn(rows, WIDTH, dtype=dtype)
    y_RD.backward(weights_RD)
    loop_y_RD.backward(weights_RD)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(y_RD, loop_y_RD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(x_RD.grad, loop_x_RD.grad, rtol=tolerance, atol=tolerance)
    assert_same(gradients(experts), stacked_gradients(networks), tolerance)


@kinds
def test_parameters_have_the_documented_shapes(kind: dict[str, Any]) -> None:
    experts = build_experts(parse(kind), range(EXPERTS), WIDTH)
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    expected = {
        "up_weight": (EXPERTS, WIDTH, HIDDEN),
        "down_weight": (EXPERTS, HIDDEN, WIDTH),
        "up_bias": (EXPERTS, HIDDEN),
        "down_bias": (EXPERTS, WIDTH),
        "gate_weight": (EXPERTS, WIDTH, HIDDEN),
    }
    if kind["kind"] == "swiglu" or not kind.get("bias", True):
        del expected["up_bias"], expected["down_bias"]
    if kind["kind"] != "swiglu":
        del expected["gate_weight"]
    assert shapes == expected


def hidden_of(experts: Any, x_RD: Tensor, expert_R: Tensor) -> Tensor:
    """Activations of the hidden layer."""
    up_RF = torch.einsum("rd,rdf->rf", x_RD, experts.up_weight[expert_R])
    if experts.gate_weight is not None:
        gate_RF = torch.einsum("rd,rdf->rf", x_RD, experts.gate_weight[expert_R])
        return torch.nn.functional.silu(gate_RF) * up_RF
    if experts.up_bias is not None:
        up_RF = up_RF + experts.up_bias[expert_R]
    return torch.nn.functional.gelu(up_RF, approximate="tanh")


@kinds
def test_dropout_acts_on_the_hidden_layer_while_training_only(kind: dict[str, Any]) -> None:
    config = parse({**kind, "dropout": 0.5})
    experts = randomise(build_experts(config, range(EXPERTS), WIDTH))
    counts_E, expert_R = groups(63, "mixed")
    x_RD = torch.randn(63, WIDTH)
    experts.eval()
    y_RD = experts(x_RD, counts_E)
    assert torch.equal(y_RD, experts(x_RD, counts_E))
    experts.train()
    torch.manual_seed(1)
    dropped_RD = experts(x_RD, counts_E)
    torch.manual_seed(1)
    hidden_RF = hidden_of(experts, x_RD, expert_R)
    keep_RF = torch.nn.functional.dropout(torch.ones_like(hidden_RF), 0.5)
    expected_RD = torch.einsum("rf,rfd->rd", hidden_RF * keep_RF, experts.down_weight[expert_R])
    if experts.down_bias is not None:
        expected_RD = expected_RD + experts.down_bias[expert_R]
    assert 0.4 < keep_RF.eq(0).float().mean() < 0.6
    torch.testing.assert_close(dropped_RD, expected_RD, rtol=1e-4, atol=1e-4)


@kinds
def test_bf16_is_finite_and_near(kind: dict[str, Any]) -> None:
    config = parse(kind)
    experts = randomise(build_experts(config, range(EXPERTS), WIDTH), 0.5).bfloat16()
    counts_E, _ = groups(130, "one_empty")
    (x_RD,) = leaves(torch.randn(130, WIDTH).bfloat16())
    y_RD = experts(x_RD, counts_E)
    y_RD.backward(torch.randn_like(y_RD))
    assert y_RD.dtype == torch.bfloat16 and y_RD.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(experts).values())
    exact_RD = experts.float()(x_RD.float(), counts_E)
    torch.testing.assert_close(y_RD.float(), exact_RD, rtol=0.05, atol=0.05)


@kinds
def test_only_the_projection_into_the_stream_is_residual(kind: dict[str, Any]) -> None:
    network = build_feed_forward(parse(kind), WIDTH)
    residual = [name for name, m in network.named_modules() if isinstance(m, ResidualLinear)]
    assert residual == ["down"]
