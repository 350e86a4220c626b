"""One linear map per group of rows: the product all experts share.

`grouped_linear` is a single grouped matrix product; `grouped_linear_reference` is the loop that
defines it. Letters: R rows in group order, I/O widths in and out, E groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    y_RO = F.grouped_mm(x_RI, weight_EIO, offs=offsets_E)
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
    parts, start = [], 0
    for group, end in enumerate(offsets_E.tolist()):
        y = x_RI[start:end] @ weight_EIO[group]
        parts.append(y if bias_EO is None else y + bias_EO[group])
        start = end
    return torch.cat(parts)
