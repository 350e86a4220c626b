"""A linear map by the faster of two libraries.

    linear            y = x @ weight.T + bias
    linear_reference  torch's own, which defines it

On a CPU torch multiplies float32 by MKL, which runs at half of oneDNN's speed on AMD processors with
AVX-512. There the compiled operator takes oneDNN; everywhere else both are the same call. `torch.func`
does not differentiate the operator. Letters: N rows, I and O widths in and out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.ops.extension import constant_when_compiled, extension, register_operator

LEAST_WORK = 2**20
"""Multiplications. With fewer, what oneDNN does before the first takes longer than the product."""


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x[..., I] -> [..., O]; x and the weight may be views of any strides."""
    if not runs_compiled(x, weight_OI, bias_O):
        return linear_reference(x, weight_OI, bias_O)
    y_NO: Tensor = torch.ops.sra_kernels.linear.default(x.flatten(0, -2), weight_OI, bias_O)
    return y_NO.view(*x.shape[:-1], len(weight_OI))


def linear_reference(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Definition of `linear`. Looked up at each call: at ZeRO-3 DeepSpeed puts another in the place of
    `F.linear`, which does not keep the gathered weight for the backward pass."""
    return F.linear(x, weight_OI, bias_O)


def runs_compiled(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether the compiled operator takes these inputs, and is worth it."""
    given = [x, weight_OI] if bias_O is None else [x, weight_OI, bias_O]
    return (
        x.ndim > 1
        and weight_OI.ndim == 2
        and (bias_O is None or bias_O.shape == weight_OI.shape[:1])
        and x.numel() * len(weight_OI) >= LEAST_WORK
        and all(tensor.dtype == torch.float32 for tensor in given)
        and _available_on(x.device.type)
        and not torch.is_autocast_enabled(x.device.type)
    )


@constant_when_compiled
def _available_on(device_type: str) -> bool:
    there = device_type == "cpu" and device_type in extension().devices
    faster = there and bool(torch.ops.sra_kernels.onednn_is_faster())
    if faster:
        register_operator("linear", _shapes, _backward, _keep_for_backward)
    return faster


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    del bias
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x_NI, weight_OI, _ = inputs
    ctx.save_for_backward(x_NI, weight_OI)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    """By the same operator, so that it has a gradient itself."""
    x_NI, weight_OI = ctx.saved_tensors
    of_x, of_weight, of_bias = ctx.needs_input_grad
    return (
        linear(grad_NO, weight_OI.T) if of_x else None,
        outer_sum(grad_NO, x_NI) if of_weight else None,
        grad_NO.sum(0) if of_bias else None,
    )


def outer_sum(left_NO: Tensor, right_NI: Tensor) -> Tensor:
    """left.T @ right, O x I: the sum of outer products of rows, as of a weight's gradient. Perhaps
    a transposed view: oneDNN is at its best with the wider of the two in the place of the weight."""
    if not runs_compiled(left_NO, right_NI):
        return left_NO.T @ right_NI
    operator = torch.ops.sra_kernels.linear.default
    if left_NO.shape[1] > right_NI.shape[1]:
        turned_IO: Tensor = operator(right_NI.T, left_NO.T, None)
        return turned_IO.T
    sum_OI: Tensor = operator(left_NO.T, right_NI.T, None)
    return sum_OI
