"""The grouped product of `grouped_gemm`, for MegaBlocks' own expert networks, on torch's grouped_mm.

It has to be importable for MegaBlocks' grouped layer to be built at all, although our experts do their
products themselves. Letters: R rows in group order, I/O widths in and out, E groups.
"""

import torch
from torch import Tensor

from sra_ds.ops.grouped_linear import grouped_outer, grouped_rows


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes_E: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """a_RI @ b_EIO (b_EOI with `trans_b`), or with `trans_a` a_RI.T @ b_RO of each group; into `c`."""
    offsets_E = batch_sizes_E.cumsum(0, dtype=torch.int32).to(a.device)
    out: Tensor
    if trans_a:
        out = grouped_outer(a, b, offsets_E)
    else:
        out = grouped_rows(a, b.transpose(1, 2) if trans_b else b, offsets_E)
    return out if c is None else c.copy_(out)


class ops:
    """With gradients."""

    @staticmethod
    def gmm(a: Tensor, b: Tensor, batch_sizes_E: Tensor, trans_b: bool = False) -> Tensor:
        return gmm(a, b, batch_sizes_E, trans_b=trans_b)


class backend:
    """Without."""

    gmm = staticmethod(gmm)
