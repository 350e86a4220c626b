"""A weight that lives where a prime divides the distance of output and input, and its fast product.

    W[i, j] is live  iff  some prime p of the list divides i - j        (the diagonal always is)

For one prime the live entries are p dense blocks: outputs of residue r mod p meet inputs of residue r.
With several primes each live entry belongs to the first prime of the list that divides i - j, its
owner, and is zero in the blocks of the others, so the products of all blocks add up to x W^T exactly:

    values_N -> blocks_B                        the plan scatters the live values, once a call
    x_CD -> x_DC                                a chunk of tokens, channels first: the rows of one
    y_FC[r::p] += block_r x_DC[r::p]            residue are then a strided matrix that BLAS reads and
    y_FC -> y_CF                                writes in place, without a copy per prime

The multiplications are sum(1 / p) of the dense ones: .422 for 7, 11, 13, 17, 19. Letters: T tokens,
C tokens of a chunk, D columns (inputs), F rows (outputs), N live entries in row-major order (W[mask]),
B entries of all blocks, dead and padding ones included.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_CHUNK_TOKENS = 512
"""The sums of a chunk stay in the cache while prime after prime adds to them."""


def prime_mask(
    rows: int, columns: int, primes: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """Bool, rows x columns: whether a prime of the list divides i - j.

    Raises ValueError for an empty list, a number that is not prime, and a prime given twice.
    """
    _check(primes)
    gap_FD = torch.arange(rows, device=device).unsqueeze(1) - torch.arange(columns, device=device)
    return torch.stack([gap_FD % prime == 0 for prime in primes]).any(0)


def random_mask(rows: int, columns: int, primes: Sequence[int], seed: int) -> Tensor:
    """The control: in each row as many live entries as `prime_mask` has there, at random columns.

    Bool, rows x columns, on the CPU; the same for the same seed. Raises as `prime_mask`.
    """
    live_F1 = prime_mask(rows, columns, primes).sum(1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    draws_FD = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return draws_FD.argsort(1).argsort(1) < live_F1


def density(rows: int, columns: int, primes: Sequence[int]) -> float:
    """Share of live entries; 1 - prod(1 - 1/p) for large sizes. Raises as `prime_mask`."""
    return float(prime_mask(rows, columns, primes).double().mean())


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
    blocks_B = plan(_as_autocast(values_N))
    bias_F = None if bias_F is None else _as_autocast(bias_F)
    keep = torch.is_grad_enabled()
    y_TF: Tensor = _BlockProduct.apply(_as_autocast(x_TD), blocks_B, bias_F, plan, keep)
    return y_TF


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


def _check(primes: Sequence[int]) -> None:
    if not primes:
        raise ValueError("the list of primes is empty")
    for number in primes:
        if number < 2 or any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
            raise ValueError(f"{number} is not a prime, in {list(primes)}")
        if list(primes).count(number) > 1:
            raise ValueError(f"the prime {number} is given more than once, in {list(primes)}")
