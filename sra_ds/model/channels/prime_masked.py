"""A feed-forward network whose matrices live only where a prime divides the distance of channels.

Two ways to hold the same weights: whole matrices times their mask, which costs what a dense network
costs, or the live weights alone with products of dense blocks (`sra_ds.ops.prime_blocks`). Hidden
channels have no order of their own, so the pattern means nothing a priori: `pattern: random` is the
control.
"""

import torch
from torch import Tensor, nn

from sra_ds.config.model import PrimeMaskedChannelConfig
from sra_ds.layers import Linear, ResidualLinear
from sra_ds.model.channels.dense import DenseChannel
from sra_ds.ops.linear import linear
from sra_ds.ops.prime_blocks import BlockPlan, prime_block_product
from sra_ds.ops.prime_mask import prime_mask, random_mask


class SparseLinear(nn.Module):
    """What both ways share: sizes, the mask's pattern, the bias."""

    def __init__(self, dense: Linear, config: PrimeMaskedChannelConfig) -> None:
        super().__init__()
        self.rows, self.columns, self.config = dense.out_features, dense.in_features, config
        self.residual = isinstance(dense, ResidualLinear)
        self.live = int(self.make_mask(0).sum())
        self.bias = None if dense.bias is None else nn.Parameter(torch.empty(self.rows))

    def make_mask(self, seed: int) -> Tensor:
        """Boolean, rows x columns, on the CPU whatever device models are built on; the seed is for random
        places."""
        with torch.device("cpu"):
            if self.config.pattern == "random":
                return random_mask(self.rows, self.columns, self.config.primes, seed)
            return prime_mask(self.rows, self.columns, self.config.primes)

    def live_mask(self) -> Tensor:
        """Where weights live."""
        return self.make_mask(0)


class MaskedLinear(SparseLinear):
    """x[..., columns] -> x (W * mask)^T + bias. Dead weights start at 0 and have no gradient."""

    mask: Tensor

    def __init__(self, dense: Linear, config: PrimeMaskedChannelConfig) -> None:
        super().__init__(dense, config)
        self.weight = nn.Parameter(torch.empty(self.rows, self.columns))
        mask = torch.empty(self.rows, self.columns, dtype=torch.bool)
        self.register_buffer("mask", mask, persistent=False)

    def live_mask(self) -> Tensor:
        """Where weights live."""
        return self.mask

    def forward(self, x: Tensor) -> Tensor:
        """The dense product of the masked weight."""
        return linear(x, self.weight * self.mask, self.bias)


class BlockLinear(SparseLinear):
    """The same from the live weights alone, in the order of the mask's rows."""

    def __init__(self, dense: Linear, config: PrimeMaskedChannelConfig) -> None:
        super().__init__(dense, config)
        self.values = nn.Parameter(torch.empty(self.live))
        self.plan = self.make_plan()

    def make_plan(self) -> BlockPlan:
        """Where the values lie in the blocks, on the CPU."""
        with torch.device("cpu"):
            return BlockPlan(self.rows, self.columns, self.config.primes)

    def forward(self, x: Tensor) -> Tensor:
        """Products of dense blocks, those of each prime."""
        y_NF = prime_block_product(x.flatten(0, -2), self.values, self.plan, self.bias)
        return y_NF.view(*x.shape[:-1], self.rows)


STORAGES = {"masked": MaskedLinear, "blocks": BlockLinear}


class PrimeMaskedChannel(DenseChannel):
    """x_BTD, context -> (y_BTD, {})."""

    def __init__(self, config: PrimeMaskedChannelConfig, width: int) -> None:
        super().__init__(config, width)
        sparse = STORAGES[config.storage]
        for name, dense in list(self.feed_forward.named_children()):
            assert isinstance(dense, Linear)
            setattr(self.feed_forward, name, sparse(dense, config))
