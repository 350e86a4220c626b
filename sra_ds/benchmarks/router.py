"""The routing operator against other ways to compute the same, in turn in one process.

    compiled     the operator
    reference    `cosine_route_reference`
    chain        the usual chain of torch calls
    unfused      on a GPU: the kernels that take any number of experts

On a GPU replays of CUDA graphs are timed, of new tokens each round.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.benchmarks.operators import DTYPES, keep_compiled_products, label
from sra_ds.ops.cosine_route import GATES, cosine_route, cosine_route_reference
from sra_ds.ops.extension import extension
from sra_ds.timing import Times, Work, device_clock, in_turn, medians, recorded


class RouterSize(NamedTuple):
    """T tokens of width D to K of E experts."""

    tokens: int
    width: int
    experts: int
    top_k: int


ONE = {"cpu": [RouterSize(8192, 512, 128, 2)], "cuda": [RouterSize(65536, 512, 128, 2)]}
GRID = [
    RouterSize(8192, *size)
    for size in itertools.product((256, 512, 1024, 2048), (16, 128, 1024), (1, 2, 8))
]


def bench_router(rounds: int, grid: bool = False) -> dict[str, Any]:
    """Forward, and forward with backward, in float32 and bf16, of one size or of all of the grid."""
    keep_compiled_products()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    sizes = GRID if grid else ONE[device]
    with torch.device(device):
        for size, dtype, backward in itertools.product(sizes, DTYPES, (False, True)):
            found = medians(_time(size, dtype, backward, rounds, device))
            results[label(size, dtype, "with backward" if backward else "forward")] = {
                "milliseconds": found,
                "chain_over_compiled": found["chain"] / found["compiled"],
            }
    where = torch.cuda.get_device_name() if device == "cuda" else torch.get_num_threads()
    return {"kernels": extension().reason, "threads or GPU": where, **results}


def _time(size: RouterSize, dtype: torch.dtype, backward: bool, rounds: int, device: str) -> Times:
    x_TD = torch.randn(size.tokens, size.width).to(dtype).requires_grad_(backward)
    works = _routers(size, x_TD, backward, device)
    if device == "cpu":
        return in_turn(works, rounds)
    works = {name: recorded(work) for name, work in works.items()}
    return in_turn(works, rounds, device_clock, lambda number: x_TD.detach().normal_())


def _routers(size: RouterSize, x_TD: Tensor, backward: bool, device: str) -> dict[str, Work]:
    anchors_ED = torch.randn(size.experts, size.width).to(x_TD.dtype).requires_grad_(backward)
    temperature = torch.full((1,), 10.0, requires_grad=backward)
    upstream_TK, upstream_E = torch.randn(size.tokens, size.top_k), torch.randn(size.experts)

    def run(route: Callable[..., Any]) -> None:
        gates_TK, mean_probs_E = route(x_TD, anchors_ED, temperature, size.top_k)
        if backward:
            ((gates_TK * upstream_TK).sum() + (mean_probs_E * upstream_E).sum()).backward()
            x_TD.grad = anchors_ED.grad = temperature.grad = None

    def ours(function: Callable[..., Any]) -> Callable[..., Any]:
        def route(x: Tensor, anchors: Tensor, tau: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
            routing, _ = function(x, anchors, tau, top_k, "all")
            return routing.gates_TK, routing.mean_probs_E

        return route

    variants: dict[str, Work] = {
        "compiled": lambda: run(ours(cosine_route)),
        "reference": lambda: run(ours(cosine_route_reference)),
        "chain": lambda: run(_chain),
    }
    if device in extension().devices and device == "cuda":
        variants["unfused"] = lambda: run(_unfused)
    return variants


def _unfused(x: Tensor, anchors: Tensor, tau: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The compiled operator by the kernels that read dot products."""
    gate, fused = GATES.index("all"), False
    gates_TK, _, _, mean_probs_E, *_ = torch.ops.sra_kernels.cosine_route.default(
        x, anchors, tau, top_k, gate, fused, None, None, None
    )
    return gates_TK, mean_probs_E


def _chain(x: Tensor, anchors: Tensor, tau: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The usual calls, with `topk` and without a rule for ties."""
    scores = tau * (F.normalize(x.float(), dim=-1) @ F.normalize(anchors.float(), dim=-1).T)
    probs = scores.softmax(-1)
    gates, ids = probs.topk(top_k, -1)
    if ids.is_cuda:  # bincount would wait for the device
        ids.new_zeros(len(anchors)).scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
    else:
        torch.bincount(ids.flatten(), minlength=len(anchors))
    return gates / gates.sum(-1, keepdim=True), probs.mean(0)
