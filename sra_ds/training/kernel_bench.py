"""The routing operator and the experts against other ways to compute the same, in turn in one process.

    router   compiled; `cosine_route_reference`; the usual chain of torch calls; on a GPU also `unfused`,
             the kernels that take any number of experts; replays of CUDA graphs are timed, of new tokens
             each round
    experts  compiled; torch's grouped products; a loop over experts; DeepSpeed's AutoEP experts (SwiGLU
             of equal size); and the products of the same FLOPs as large matrices, the ceiling; and what
             lies around them, dispatch and combine of two routes per token, compiled and in torch

Times are medians over rounds; what counts are ratios within a run.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.ep_experts import GroupedExperts as AutoEPExperts
from torch import Tensor
from tqdm import tqdm

from sra_ds.ops.cosine_route import GATES, cosine_route, cosine_route_reference
from sra_ds.ops.dispatch import combine, dispatch, plan_dispatch
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.ops.feed_forward import Weights, feed_forward, feed_forward_reference

Work = Callable[[], object]
WARM_UP = 2
ROUTES = 2
SKEW = 1.5
"""Concentration of the Dirichlet distribution loads are drawn from: the fullest of 128 experts has about
four times the mean."""


class RouterSize(NamedTuple):
    """T tokens of width D to K of E experts."""

    tokens: int
    width: int
    experts: int
    top_k: int


class ExpertsSize(NamedTuple):
    """R rows of width D through E experts of hidden width F."""

    rows: int
    width: int
    hidden: int
    experts: int


ROUTER = {"cpu": [RouterSize(8192, 512, 128, 2)], "cuda": [RouterSize(65536, 512, 128, 2)]}
ROUTER_GRID = [
    RouterSize(8192, *size)
    for size in itertools.product((256, 512, 1024, 2048), (16, 128, 1024), (1, 2, 8))
]
EXPERTS = [ExpertsSize(16384, 512, 1024, 128)]
DTYPES = (torch.float32, torch.bfloat16)


def bench_kernels(what: str, rounds: int) -> dict[str, Any]:
    """`router`, `router-grid` or `experts`, in float32 and bf16."""
    # or variants, which take turns, would throw each other's compiled products out of oneDNN's cache
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16384"
    if what == "experts":
        return bench_experts(EXPERTS, rounds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        return bench_router(ROUTER[device] if what == "router" else ROUTER_GRID, rounds, device)


def medians(
    variants: dict[str, Work], rounds: int, device: str = "cpu", renew: Work = lambda: None
) -> dict[str, float]:
    """Milliseconds of each, one after the other in every round, after `renew`."""
    if device == "cuda":
        variants = {name: _recorded(work) for name, work in variants.items()}
    milliseconds = _device_milliseconds if device == "cuda" else _milliseconds
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(rounds + WARM_UP), "rounds", leave=False):
        for name, work in variants.items():
            renew()
            found = milliseconds(work)
            if number >= WARM_UP:
                times[name].append(found)
    return {name: statistics.median(found) for name, found in times.items()}


def _milliseconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _device_milliseconds(work: Work) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _recorded(work: Work) -> Work:
    """The same as a CUDA graph, so that the GPU does not wait for Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def bench_router(sizes: list[RouterSize], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Forward, and forward with backward, of every size."""
    results = {}
    for size, dtype, backward in itertools.product(sizes, DTYPES, (False, True)):
        x_TD = torch.randn(size.tokens, size.width).to(dtype).requires_grad_(backward)
        variants = _routers(size, x_TD, backward, device)
        renew = x_TD.detach().normal_ if device == "cuda" else lambda: None
        found = medians(variants, rounds, device, renew)
        results[_name(size, dtype, "with backward" if backward else "forward")] = {
            "milliseconds": found,
            "chain_over_compiled": found["chain"] / found["compiled"],
        }
    where = torch.cuda.get_device_name() if device == "cuda" else torch.get_num_threads()
    return {"kernels": extension().reason, "threads or GPU": where, **results}


def _name(size: RouterSize | ExpertsSize, dtype: torch.dtype, what: str) -> str:
    sizes = " ".join(f"{value} {name}" for name, value in size._asdict().items())
    return f"{sizes}, {str(dtype).removeprefix('torch.')}, {what}"


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


def bench_experts(sizes: list[ExpertsSize], rounds: int) -> dict[str, Any]:
    """Forward with backward of every size; `of_ceiling` is the share of the ceiling's speed."""
    results = {}
    for size, dtype in itertools.product(sizes, DTYPES):
        counts_E = _loads(size)
        found = medians(_experts(size, dtype, counts_E), rounds)
        results[_name(size, dtype, "with backward")] = {
            "fullest_over_mean": float(counts_E.max()) * size.experts / size.rows,
            "milliseconds": found,
            "grouped_over_compiled": found["grouped"] / found["compiled"],
            "of_ceiling": {name: found["ceiling"] / ms for name, ms in found.items()},
            "dispatch_and_combine": medians(_around(size, dtype), rounds),
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
