"""The seven functions of MegaBlocks' CUDA extension, on any device and without waiting for it.

Those that return nothing write into `out`, which the caller allocates. Letters: B batch rows, N entries,
E bins (experts), M outputs.
"""

import torch
from torch import Tensor


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """int32 counts of the values 0 .. num_bins-1 in x_N or in each row of x_BN; others count nothing."""
    rows_BN = x.long() if x.dim() == 2 else x.long().unsqueeze(0)
    counted_BN = (rows_BN >= 0) & (rows_BN < num_bins)
    out_BE = torch.zeros(len(rows_BN), num_bins + 1, dtype=torch.int32, device=x.device)
    bins_BN = rows_BN.where(counted_BN, num_bins)
    out_BE.scatter_add_(1, bins_BN, torch.ones_like(bins_BN, dtype=torch.int32))
    out_BE = out_BE[:, :num_bins].contiguous()
    return out_BE if x.dim() == 2 else out_BE[0]


def sort(x_N: Tensor, end_bit: int, x_out_N: Tensor, iota_out_N: Tensor) -> None:
    """Stable ascending sort of non-negative values below 2**end_bit, and where each came from."""
    del end_bit
    sorted_N, order_N = x_N.sort(stable=True)
    x_out_N.copy_(sorted_N)
    iota_out_N.copy_(order_N)


def inclusive_cumsum(x_BN: Tensor, dim: int, out_BN: Tensor) -> None:
    """Running sums, each with its own entry."""
    out_BN.copy_(x_BN.cumsum(dim, dtype=x_BN.dtype))


def exclusive_cumsum(x_BN: Tensor, dim: int, out_BN: Tensor) -> None:
    """Running sums of the entries before each."""
    out_BN.copy_(x_BN.cumsum(dim, dtype=x_BN.dtype) - x_BN)


def indices(
    padded_bins_E: Tensor, block_size: int, block_rows: int, block_columns: int, out: Tensor
) -> None:
    """Columns of the blocks of a block-diagonal matrix, row of blocks after row: the rows of bin e have
    the `block_columns` columns from e * block_columns on. `padded_bins_E` are the ends of the bins."""
    ends_E = padded_bins_E // block_size
    every = torch.arange(block_rows, dtype=ends_E.dtype, device=ends_E.device)
    bin_of_row = torch.searchsorted(ends_E, every, right=True)
    columns = torch.arange(block_columns, device=ends_E.device)
    out.copy_((bin_of_row.unsqueeze(1) * block_columns + columns).flatten())


def replicate_forward(x_BE: Tensor, bins_E: Tensor, out_BM: Tensor) -> None:
    """Entry e as often as bin e is long; `bins_E` are the ends of the bins."""
    out_BM.copy_(x_BE.index_select(1, _bin_of(bins_E, out_BM.shape[1])))


def replicate_backward(grad_BM: Tensor, bins_E: Tensor, out_BE: Tensor) -> None:
    """Sum over each bin, in float32."""
    sums_BE = torch.zeros(out_BE.shape, dtype=torch.float32, device=out_BE.device)
    sums_BE.index_add_(1, _bin_of(bins_E, grad_BM.shape[1]), grad_BM.float())
    out_BE.copy_(sums_BE)


def _bin_of(bins_E: Tensor, outputs: int) -> Tensor:
    every_M = torch.arange(outputs, dtype=bins_E.dtype, device=bins_E.device)
    return torch.searchsorted(bins_E, every_M, right=True)
