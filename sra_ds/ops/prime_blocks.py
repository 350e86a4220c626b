"""Product with a weight that lives where a prime divides i - j, from its live values alone.

For one prime the live entries are p dense blocks: outputs of residue r mod p meet inputs of residue r.
With several primes each live entry belongs to the first prime of the list that divides i - j, its
owner, and is zero in the blocks of the others, so the products of all blocks add up to x W^T exactly:

    values_N -> blocks_B                        the plan scatters the live values, once a call
    x_CD -> x_DC                                a chunk of tokens, channels first: the rows of one
    y_FC[r::p] += block_r x_DC[r::p]            residue are then a strided matrix that is read and
    y_FC -> y_CF                                written in place, without a copy per prime

The multiplications are sum(1 / p) of the dense ones: .422 for 7, 11, 13, 17, 19. On CPUs the compiled
operator does it in float32, chunks of tokens in parallel and vectors along the tokens; elsewhere batched
products of torch. Letters: T tokens, C tokens of a chunk, D columns (inputs), F rows (outputs), N live
entries in row-major order (W[mask]), B entries of all blocks, dead and padding ones included.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sra_ds.ops.extension import constant_when_compiled, extension, register_operator
from sra_ds.ops.prime_mask import prime_mask

CPU_CHUNK_TOKENS = 512
"""The sums of a chunk stay in the cache while prime after prime adds to them."""


class BlockPlan(nn.Module):
    """Where each live value of a weight of rows x columns lies in the blocks.

    Prime p has p blocks of ceil(rows / p) x ceil(columns / p); the blocks of all primes are one flat
    vector. `place_N`, int64, is the only state: a buffer that moves with the module that holds the plan
    and is not saved. Raises as `prime_mask`.
    """

    place_N: Tensor

    def __init__(self, rows: int, columns: int, primes: Sequence[int]) -> None:
        super().__init__()
        mask_FD = prime_mask(rows, columns, primes)
        self.rows, self.columns = rows, columns
        self.primes = tuple(primes)
        self.shapes = [(p, math.ceil(rows / p), math.ceil(columns / p)) for p in primes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.padding = max(primes) - 1
        # BLAS forms the gradient of a block faster when it lies with its longer side last
        self.columns_first = columns < rows
        self.register_buffer("place_N", self._places()[mask_FD], persistent=False)

    def _places(self) -> Tensor:
        row_F1, column_D = torch.arange(self.rows).unsqueeze(1), torch.arange(self.columns)
        places_FD = torch.zeros(self.rows, self.columns, dtype=torch.int64)
        # from the last prime to the first, so that the owner is written last
        for places in reversed(self.split(torch.arange(sum(self.sizes)))):
            p = len(places)
            place_FD = places[row_F1 % p, row_F1 // p, column_D // p]
            places_FD = torch.where((row_F1 - column_D) % p == 0, place_FD, places_FD)
        return places_FD

    def forward(self, values_N: Tensor) -> Tensor:
        """blocks_B: zero where dead, owned by an earlier prime, or padding."""
        return values_N.new_zeros(sum(self.sizes)).index_copy(0, self.place_N, values_N)

    def split(self, blocks_B: Tensor) -> list[Tensor]:
        """Views, one of p x ceil(rows / p) x ceil(columns / p) per prime."""
        parts = zip(blocks_B.split(self.sizes), self.shapes, strict=True)
        if self.columns_first:
            return [part.view(p, columns, rows).mT for part, (p, rows, columns) in parts]
        return [part.view(shape) for part, shape in parts]


def prime_block_product(
    x_TD: Tensor, values_N: Tensor, plan: BlockPlan, bias_F: Tensor | None
) -> Tensor:
    """y_TF = x_TD W^T + bias for the weight with these live values; x has exactly two dimensions.

    Sums are float32 at least; y has x's dtype, or under autocast its dtype. Not twice differentiable.
    Raises ValueError if x or the values do not fit the plan.
    """
    if x_TD.ndim != 2 or x_TD.shape[1] != plan.columns:
        raise ValueError(f"x must be tokens x {plan.columns}, not {tuple(x_TD.shape)}")
    if values_N.shape != plan.place_N.shape:
        raise ValueError(f"values must be {len(plan.place_N)} numbers, not {tuple(values_N.shape)}")
    x_TD, blocks_B = _as_autocast(x_TD), plan(_as_autocast(values_N))
    bias_F = None if bias_F is None else _as_autocast(bias_F)
    if runs_compiled(x_TD):
        operator = torch.ops.sra_kernels.prime_blocks.default
        how = (list(plan.primes), plan.rows, plan.columns_first)
        compiled_TF: Tensor = operator(x_TD.contiguous(), blocks_B, *how)
        return compiled_TF if bias_F is None else compiled_TF + bias_F
    keep = torch.is_grad_enabled()
    y_TF: Tensor = _BlockProduct.apply(x_TD, blocks_B, bias_F, plan, keep)
    return y_TF


def runs_compiled(x_TD: Tensor) -> bool:
    """Whether the compiled operator takes these rows."""
    return x_TD.dtype == torch.float32 and _available_on(x_TD.device.type)


def prime_block_product_reference(
    x_TD: Tensor, values_N: Tensor, mask_FD: Tensor, bias_F: Tensor | None
) -> Tensor:
    """Definition of `prime_block_product` by the dense weight."""
    weight_FD = values_N.new_zeros(mask_FD.shape).masked_scatter(mask_FD, values_N)
    return F.linear(x_TD, weight_FD, bias_F)


class _BlockProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, blocks_B: Tensor, bias_F: Tensor | None, plan: BlockPlan, keep: bool
    ) -> Tensor:
        y_TF = x_TD.new_empty(len(x_TD), plan.rows)
        kept = []
        for x_CD, y_CF in zip(_chunks(x_TD), _chunks(y_TF), strict=True):
            x_DC = _channels_first(x_CD, plan.padding)
            y_FC = _sums_for(y_CF, plan.padding)
            if bias_F is not None:
                y_FC[: plan.rows] = bias_F.unsqueeze(1)
            for block in plan.split(blocks_B):
                _add_product(_residues(y_FC, block, 1), block, _residues(x_DC, block, 2))
            y_CF.copy_(y_FC[: plan.rows].T)
            if keep:
                kept.append(x_DC)
        ctx.save_for_backward(blocks_B, *kept)
        ctx.plan = plan
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        blocks_B, *kept = ctx.saved_tensors
        plan: BlockPlan = ctx.plan
        grad_TD = grad_TF.new_empty(len(grad_TF), plan.columns)
        grad_B = torch.zeros_like(blocks_B, dtype=_wide(blocks_B))
        pairs = list(zip(plan.split(blocks_B), plan.split(grad_B), strict=True))
        for x_DC, grad_CF, grad_CD in zip(kept, _chunks(grad_TF), _chunks(grad_TD), strict=True):
            grad_FC = _channels_first(grad_CF, plan.padding)
            grad_DC = _sums_for(grad_CD, plan.padding)
            for block, grad_block in pairs:
                x, grad = _residues(x_DC, block, 2), _residues(grad_FC, block, 1)
                _add_product(_residues(grad_DC, block, 2), block.mT, grad)
                if plan.columns_first:
                    _add_product(grad_block.mT, x, grad.mT)
                else:
                    _add_product(grad_block, grad, x.mT)
            grad_CD.copy_(grad_DC[: plan.columns].T)
        grad_bias_F = grad_TF.sum(0) if ctx.needs_input_grad[2] else None
        return grad_TD, grad_B.to(blocks_B.dtype), grad_bias_F, None, None


def _chunks(x_TD: Tensor) -> list[Tensor]:
    return list(x_TD.split(CPU_CHUNK_TOKENS if x_TD.is_cpu else max(len(x_TD), 1)))


def _channels_first(x_CD: Tensor, padding: int) -> Tensor:
    width = x_CD.shape[1]
    x_DC = x_CD.new_empty(width + padding, len(x_CD))
    x_DC[:width], x_DC[width:] = x_CD.T, 0
    return x_DC


def _sums_for(y_CF: Tensor, padding: int) -> Tensor:
    return y_CF.new_zeros(y_CF.shape[1] + padding, len(y_CF), dtype=_wide(y_CF))


def _residues(channels_first: Tensor, block: Tensor, side: int) -> Tensor:
    """View: p residues x channels of one residue x tokens; channels are the `side` of the block."""
    p, channels = len(block), block.shape[side]
    return channels_first[: p * channels].view(channels, p, channels_first.shape[1]).transpose(0, 1)


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    if sums.dtype == left.dtype:
        sums.baddbmm_(left, right)
    else:
        sums += torch.bmm(left, right)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _as_autocast(x: Tensor) -> Tensor:
    """What autocast does to the arguments of F.linear; float64 stays."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


@constant_when_compiled
def _available_on(device_type: str) -> bool:
    available = device_type == "cpu" and device_type in extension().devices
    if available:
        register_operator(
            "prime_blocks",
            lambda x, blocks, primes, rows, first: x.new_empty(x.shape[0], rows),
            _compiled_backward,
            _keep_for_backward,
            lambda grad, x, blocks, primes, first: (torch.empty_like(x), torch.empty_like(blocks)),
        )
    return available


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, blocks_B, ctx.primes, _, ctx.columns_first = inputs
    ctx.save_for_backward(x_TD, blocks_B)


def _compiled_backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, blocks_B = ctx.saved_tensors
    operator = torch.ops.sra_kernels.prime_blocks_backward.default
    gradients = operator(grad_TF.contiguous(), x_TD, blocks_B, ctx.primes, ctx.columns_first)
    return (*gradients, None, None, None)
