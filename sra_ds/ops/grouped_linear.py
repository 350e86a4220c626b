"""One linear map per group of rows: the product all experts share.

    grouped_linear            y = x @ weight[e] + bias[e] for the rows of group e
    grouped_linear_reference  the loop that defines it

The two products (rows by weights, and the weights' gradient) are operators with fake kernels of their
own, because torch 2.13's fake kernel of `grouped_mm` refuses float32 under `torch.compile`. float64,
which `grouped_mm` does not take, runs the defining loop: it is for tests. Letters: R rows in group
order, I/O widths in and out, E groups.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(
    x_RI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    offsets_E: Tensor,
    group_of_row_R: Tensor,
) -> Tensor:
    """x @ weight[e] + bias[e] for the rows of each group e; I and O are multiples of 16 bytes.

    `offsets_E` (int32) holds the end of each group and covers every row; groups may be empty.
    """
    y_RO: Tensor = grouped_rows(x_RI, weight_EIO, offsets_E)
    if bias_EO is None:
        return y_RO
    return y_RO + bias_EO.index_select(0, group_of_row_R)


def grouped_linear_reference(
    x_RI: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    offsets_E: Tensor,
    group_of_row_R: Tensor,
) -> Tensor:
    """Definition of `grouped_linear`, one group at a time."""
    del group_of_row_R
    parts = []
    for group, rows in enumerate(_groups(offsets_E)):
        y = x_RI[rows] @ weight_EIO[group]
        parts.append(y if bias_EO is None else y + bias_EO[group])
    return torch.cat(parts)


@torch.library.custom_op("sra_ds::grouped_rows", mutates_args=())
def grouped_rows(x_RI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """y_RO: rows of group e times weight[e]."""
    if x_RI.dtype in GROUPED_DTYPES:
        return F.grouped_mm(x_RI, weight_EIO, offs=offsets_E)
    return torch.cat([x_RI[rows] @ weight_EIO[e] for e, rows in enumerate(_groups(offsets_E))])


@torch.library.custom_op("sra_ds::grouped_outer", mutates_args=())
def grouped_outer(x_RI: Tensor, y_RO: Tensor, offsets_E: Tensor) -> Tensor:
    """weight gradient E x I x O: x.T @ y over the rows of each group, 0 for an empty one."""
    if x_RI.dtype in GROUPED_DTYPES:
        return F.grouped_mm(x_RI.T, y_RO, offs=offsets_E)
    return torch.stack([x_RI[rows].T @ y_RO[rows] for rows in _groups(offsets_E)])


@grouped_rows.register_fake
def _(x_RI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    del offsets_E
    return x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2])


@grouped_outer.register_fake
def _(x_RI: Tensor, y_RO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_RI.new_empty(offsets_E.shape[0], x_RI.shape[1], y_RO.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _rows_backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RI, weight_EIO, offsets_E = ctx.saved_tensors
    grad_RO = grad_RO.contiguous()
    grad_x_RI = grouped_rows(grad_RO, weight_EIO.transpose(1, 2), offsets_E)
    return grad_x_RI, grouped_outer(x_RI, grad_RO, offsets_E), None


grouped_rows.register_autograd(_rows_backward, setup_context=_keep_inputs)


def _groups(offsets_E: Tensor) -> list[slice]:
    ends = offsets_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
