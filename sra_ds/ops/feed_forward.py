"""Feed-forward networks of all experts on rows grouped by expert, as one operator.

    gelu     y = gelu(x @ up[e] + up_bias[e]) @ down[e] + down_bias[e]       for the rows of expert e
    swiglu   y = (silu(x @ gate[e]) * (x @ up[e])) @ down[e]

    feed_forward            compiled, on CPUs: experts in parallel, each on one thread and in its cache
    feed_forward_reference  grouped products of torch, which define it

Letters: R rows in group order, D width, F hidden width, E experts.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.ops.extension import constant_when_compiled, extension, register_operator
from sra_ds.ops.grouped_linear import grouped_linear

COMPILED_DTYPES = (torch.float32, torch.bfloat16)
EXPERTS_PER_THREAD = 2
"""With fewer, threads would wait for the fullest expert."""


class Weights(NamedTuple):
    """Stacked parameters: `gate` E x D x F or None for gelu, `up` E x D x F, `up_bias` E x F or None,
    `down` E x F x D, `down_bias` E x D or None."""

    gate: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def feed_forward(x_RD: Tensor, weights: Weights, offsets_E: Tensor, dropout: float = 0.0) -> Tensor:
    """y_RD; `offsets_E` (int32) holds the end of each group and covers every row; groups may be empty.
    `dropout` is the share of hidden activations that are dropped now."""
    if not runs_compiled(x_RD, weights, dropout):
        return feed_forward_reference(x_RD, weights, offsets_E, dropout)
    operator = torch.ops.sra_kernels.feed_forward.default
    stacked = (weight if weight is None else weight.contiguous() for weight in weights)
    y_RD: Tensor = operator(x_RD.contiguous(), *stacked, offsets_E)[0]
    return y_RD


def feed_forward_reference(
    x_RD: Tensor, weights: Weights, offsets_E: Tensor, dropout: float = 0.0
) -> Tensor:
    """Definition of `feed_forward`."""
    every_R = torch.arange(len(x_RD), device=x_RD.device, dtype=torch.int32)
    group_R = torch.searchsorted(offsets_E, every_R, right=True)
    up_RF = grouped_linear(x_RD, weights.up, weights.up_bias, offsets_E, group_R)
    if weights.gate is None:
        hidden_RF = F.gelu(up_RF, approximate="tanh")
    else:
        hidden_RF = F.silu(grouped_linear(x_RD, weights.gate, None, offsets_E, group_R)) * up_RF
    hidden_RF = F.dropout(hidden_RF, dropout, training=dropout > 0)
    return grouped_linear(hidden_RF, weights.down, weights.down_bias, offsets_E, group_R)


def runs_compiled(x_RD: Tensor, weights: Weights, dropout: float) -> bool:
    """Whether the compiled operator takes these inputs."""
    same = {x_RD.dtype} == {weight.dtype for weight in weights if weight is not None}
    biased = weights.up_bias is not None
    usual = biased == (weights.down_bias is not None) and not (biased and weights.gate is not None)
    return (
        _available_on(x_RD.device.type, weights.up.shape[0])
        and same
        and usual
        and dropout == 0
        and x_RD.dtype in COMPILED_DTYPES
    )


@constant_when_compiled
def _available_on(device_type: str, experts: int) -> bool:
    enough = experts >= EXPERTS_PER_THREAD * torch.get_num_threads()
    available = enough and device_type == "cpu" and device_type in extension().devices
    if available:
        _register()
    return available


def _register() -> None:
    register_operator("feed_forward", _shapes, _backward, _keep_for_backward, _gradient_shapes)


def _shapes(x: Tensor, gate: Tensor | None, up: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = x.shape[0], up.shape[2]
    gates = x.new_empty(0 if gate is None else rows, hidden)
    return torch.empty_like(x), gates, x.new_empty(rows, hidden)


def _gradient_shapes(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    offsets: Tensor,
    kept_gate: Tensor,
    kept_up: Tensor,
    biased: bool,
) -> tuple[Tensor, ...]:
    experts, width, hidden = up.shape
    grad_gate = x.new_empty(0 if gate is None else experts, width, hidden)
    biases = (x.new_empty(experts if biased else 0, size) for size in (hidden, width))
    up_bias, down_bias = biases
    return (
        torch.empty_like(x), grad_gate, torch.empty_like(up), up_bias, torch.empty_like(down), down_bias
    )  # fmt: skip


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, gate_weight, up_weight, up_bias, down_weight, _, offsets = inputs
    ctx.biased = up_bias is not None
    ctx.save_for_backward(x, gate_weight, up_weight, down_weight, offsets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # of what is kept, R x F zeros


def _backward(ctx: Any, grad_y: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    if grad_y is None:
        return (None,) * 7
    gradients = torch.ops.sra_kernels.feed_forward_backward(grad_y.contiguous(), *kept, ctx.biased)
    x, gate, up, up_bias, down, down_bias = gradients
    gated = kept[1] is not None
    biases = (up_bias, down_bias) if ctx.biased else (None, None)
    return x, gate if gated else None, up, biases[0], down, biases[1], None
