"""The experts against other ways to compute the same, in turn in one process.

    compiled    the operator
    grouped     torch's grouped products
    loop        one expert after the other
    autoep      DeepSpeed's AutoEP experts (SwiGLU of equal size)
    ceiling     the products of the same FLOPs as large matrices

and what lies around them: dispatch and combine of two routes per token, compiled and in torch.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts as AutoEPExperts
from torch import Tensor

from sra_ds.benchmarks.operators import DTYPES, keep_compiled_products, label
from sra_ds.ops.dispatch import combine, dispatch, plan_dispatch
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.ops.feed_forward import Weights, feed_forward, feed_forward_reference
from sra_ds.timing import Work, in_turn, medians

ROUTES = 2
SKEW = 1.5
"""Concentration of the Dirichlet distribution loads are drawn from: the fullest of 128 experts has about
four times the mean."""


class ExpertsSize(NamedTuple):
    """R rows of width D through E experts of hidden width F."""

    rows: int
    width: int
    hidden: int
    experts: int


SIZES = [ExpertsSize(16384, 512, 1024, 128)]


def bench_experts(rounds: int) -> dict[str, Any]:
    """Forward with backward in float32 and bf16; `of_ceiling` is the share of the ceiling's speed."""
    keep_compiled_products()
    results = {}
    for size, dtype in itertools.product(SIZES, DTYPES):
        counts_E = _loads(size)
        found = medians(in_turn(_experts(size, dtype, counts_E), rounds))
        results[label(size, dtype, "with backward")] = {
            "fullest_over_mean": float(counts_E.max()) * size.experts / size.rows,
            "milliseconds": found,
            "grouped_over_compiled": found["grouped"] / found["compiled"],
            "of_ceiling": {name: found["ceiling"] / ms for name, ms in found.items()},
            "dispatch_and_combine": medians(in_turn(_around(size, dtype), rounds)),
        }
    return {"kernels": extension().reason, "threads": torch.get_num_threads(), **results}


def _loads(size: ExpertsSize) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shares = torch._standard_gamma(torch.full((size.experts,), SKEW), generator=generator)
    drawn = torch.multinomial(shares, size.rows, replacement=True, generator=generator)
    return torch.bincount(drawn, minlength=size.experts)


def _parameter(dtype: torch.dtype, *shape: int) -> Tensor:
    values: Tensor = torch.randn(shape) / shape[-2] ** 0.5
    return values.to(dtype).requires_grad_()


def _experts(size: ExpertsSize, dtype: torch.dtype, counts_E: Tensor) -> dict[str, Work]:
    width, hidden, experts = size.width, size.hidden, size.experts
    offsets_E = counts_E.cumsum(0, dtype=torch.int32)
    x_RD = torch.randn(size.rows, width).to(dtype).requires_grad_()
    upstream_RD = torch.randn(size.rows, width).to(dtype)
    up = _parameter(dtype, experts, width, hidden)
    down = _parameter(dtype, experts, hidden, width)
    biases = (_parameter(dtype, experts, n) for n in (hidden, width))
    weights = Weights(None, up, next(biases), down, next(biases))
    gated = AutoEPExperts(width, 2 * hidden // 3 // 16 * 16, experts).to(dtype)
    for tensor in gated.parameters():
        torch.nn.init.normal_(tensor, std=width**-0.5)
    left_RF = torch.randn(size.rows, hidden).to(dtype)

    def run(function: Callable[[], Tensor]) -> None:
        function().backward(upstream_RD)
        for tensor in (x_RD, *weights, *gated.parameters()):
            if tensor is not None:
                tensor.grad = None

    def compiled() -> Tensor:
        with use_kernels("compiled"):
            return feed_forward(x_RD, weights, offsets_E)

    def autoep() -> Tensor:
        y_RD: Tensor = gated(x_RD, counts_E)
        return y_RD

    def loop() -> Tensor:
        parts, stacked = (
            x_RD.split(counts_E.tolist()),
            [w.unbind() for w in weights if w is not None],
        )
        return torch.cat([
            F.gelu(x @ w1 + b1, approximate="tanh") @ w2 + b2
            for x, w1, b1, w2, b2 in zip(parts, *stacked, strict=True)
        ])  # fmt: skip

    return {
        "compiled": lambda: run(compiled),
        "grouped": lambda: run(lambda: feed_forward_reference(x_RD, weights, offsets_E)),
        "loop": lambda: run(loop),
        "autoep": lambda: run(autoep),
        "ceiling": lambda: _six_products(x_RD, left_RF, up[0], down[0]),
    }


def _around(size: ExpertsSize, dtype: torch.dtype) -> dict[str, Work]:
    tokens = size.rows // ROUTES
    x_TD = torch.randn(tokens, size.width).to(dtype).requires_grad_()
    upstream_TD = torch.randn(tokens, size.width).to(dtype)
    gates_TK = torch.rand(tokens, ROUTES, requires_grad=True)
    ids_TK = torch.rand(tokens, size.experts).topk(ROUTES).indices

    def run(kernels: str) -> None:
        with use_kernels(kernels):
            plan = plan_dispatch(ids_TK, size.experts)
            combine(dispatch(x_TD, plan), gates_TK, plan).backward(upstream_TD)
        x_TD.grad = gates_TK.grad = None

    return {"compiled": lambda: run("compiled"), "torch": lambda: run("reference")}


@torch.no_grad()
def _six_products(x_RD: Tensor, hidden_RF: Tensor, up_DF: Tensor, down_FD: Tensor) -> None:
    """Of the FLOPs of one expert that gets all rows: forward, gradients of rows, gradients of weights."""
    for left, right in ((x_RD, up_DF), (hidden_RF, down_FD)) * 2:
        torch.mm(left, right)
    torch.mm(x_RD.T, hidden_RF)
    torch.mm(hidden_RF.T, x_RD)
