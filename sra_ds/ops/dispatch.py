"""Dispatch and combine: tokens to experts and back, dropless, without a Python loop.

    plan = plan_dispatch(expert_ids_TK, E)       sort the T*K routes by expert
    x_RD = dispatch(x_TD, plan)                  rows of one expert lie together
    out_TD = combine(y_RD, gates_TK, plan)       sum over k of gate * row

Both are permutations up to the factor K, so their backward passes are gathers too: no scatter, hence
deterministic. Letters: T tokens, K routes per token, R = T*K routes, D width, E experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sra_ds.ops.extension import constant_when_compiled, extension, register_operator
from sra_ds.ops.precision import at_least_float32

COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DispatchPlan(NamedTuple):
    """`order_R`: route numbers (t*K + k) sorted by expert, ties by route; `inverse_R`: its inverse;
    `counts_E`: int32 rows of each expert."""

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor


def plan_dispatch(expert_ids_TK: Tensor, experts: int) -> DispatchPlan:
    """Sort routes by expert. Every route is kept, whatever the load."""
    ids_R = expert_ids_TK.flatten()
    sorted_R, order_R = ids_R.sort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R.scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    every_E = torch.arange(experts, device=ids_R.device, dtype=ids_R.dtype)
    ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    return DispatchPlan(order_R, inverse_R, counts_E)


def plan_of_tokens(expert_ids_TK: Tensor) -> DispatchPlan:
    """The plan of routes that lie in the order of their tokens, for `combine`; it counts nothing."""
    order_R = torch.arange(expert_ids_TK.numel(), device=expert_ids_TK.device)
    return DispatchPlan(order_R, order_R, order_R[:0].int())


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows of `x_TD`, one per route, in expert order: x_RD."""
    result: Tensor
    if runs_compiled(x_TD):
        result = torch.ops.sra_kernels.dispatch.default(x_TD.contiguous(), plan.inverse_R)
    else:
        result = _Dispatch.apply(x_TD, plan.order_R, plan.inverse_R)
    return result


def combine(y_RD: Tensor, gates_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """out_TD[t] = sum_k gates_TK[t, k] * y of that route, in float32 at least, in y's dtype."""
    result: Tensor
    if runs_compiled(y_RD) and gates_TK.dtype == torch.float32:
        operator = torch.ops.sra_kernels.combine.default
        result = operator(y_RD.contiguous(), gates_TK.contiguous(), plan.inverse_R)
    else:
        result = _Combine.apply(y_RD, gates_TK, plan.order_R, plan.inverse_R)
    return result


def runs_compiled(rows: Tensor) -> bool:
    """Whether the compiled operators take these rows."""
    return rows.dtype in COMPILED_DTYPES and _available_on(rows.device.type)


def dispatch_reference(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Definition of `dispatch` by plain indexing."""
    return x_TD[plan.order_R // (len(plan.order_R) // len(x_TD))]


def combine_reference(y_RD: Tensor, gates_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Definition of `combine` by adding each gated row to its token."""
    gates_R = gates_TK.flatten()[plan.order_R]
    rows_RD = at_least_float32(y_RD) * gates_R[:, None]
    tokens_R = plan.order_R // gates_TK.shape[1]
    out_TD = rows_RD.new_zeros(gates_TK.shape[0], y_RD.shape[1]).index_add(0, tokens_R, rows_RD)
    return out_TD.to(y_RD.dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.tokens = x_TD.shape[0]
        ctx.routes_per_token = order_R.shape[0] // max(ctx.tokens, 1)
        return x_TD.index_select(0, order_R // max(ctx.routes_per_token, 1))

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        rows_RD = grad_RD.index_select(0, inverse_R)
        rows_TKD = rows_RD.view(ctx.tokens, ctx.routes_per_token, grad_RD.shape[1])
        return rows_TKD.sum(1), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, gates_TK: Tensor, order_R: Tensor, inverse_R: Tensor
    ) -> Tensor:
        rows_TKD = y_RD.index_select(0, inverse_R).view(*gates_TK.shape, y_RD.shape[1])
        ctx.save_for_backward(rows_TKD, gates_TK, order_R)
        weighted_TKD = at_least_float32(rows_TKD) * gates_TK.unsqueeze(-1)
        return weighted_TKD.sum(1).to(y_RD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_TKD, gates_TK, order_R = ctx.saved_tensors
        grad_TD = at_least_float32(grad_TD)
        grad_gates_TK = (at_least_float32(rows_TKD) * grad_TD.unsqueeze(1)).sum(-1)
        gates_R = gates_TK.flatten().index_select(0, order_R)
        grad_RD = grad_TD.index_select(0, order_R // gates_TK.shape[1]) * gates_R.unsqueeze(-1)
        return grad_RD.to(rows_TKD.dtype), grad_gates_TK.to(gates_TK.dtype), None, None


@constant_when_compiled
def _available_on(device_type: str) -> bool:
    available = device_type == "cpu" and device_type in extension().devices
    if available:
        _register()
    return available


def _register() -> None:
    register_operator(
        "dispatch",
        lambda x, place: x.new_empty(place.shape[0], x.shape[1]),
        _dispatch_backward,
        _keep_for_dispatch,
        lambda grad, place, tokens: grad.new_empty(tokens, grad.shape[1]),
    )
    register_operator(
        "combine",
        lambda rows, gates, place: rows.new_empty(gates.shape[0], rows.shape[1]),
        _combine_backward,
        _keep_for_combine,
        lambda grad, rows, gates, place: (torch.empty_like(rows), torch.empty_like(gates)),
    )


def _keep_for_dispatch(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x_TD, place_R = inputs
    ctx.tokens = x_TD.shape[0]
    ctx.save_for_backward(place_R)


def _dispatch_backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
    operator = torch.ops.sra_kernels.dispatch_backward.default
    return operator(grad_RD.contiguous(), *ctx.saved_tensors, ctx.tokens), None


def _keep_for_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None]:
    operator = torch.ops.sra_kernels.combine_backward.default
    return *operator(grad_TD.contiguous(), *ctx.saved_tensors), None
