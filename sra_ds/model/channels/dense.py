"""One feed-forward network for every token."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import DenseChannelConfig, PrimeMaskedChannelConfig
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts
from sra_ds.moe.experts import build_feed_forward


class DenseChannel(nn.Module):
    """x_BTD, context -> (y_BTD, {})."""

    def __init__(self, config: DenseChannelConfig | PrimeMaskedChannelConfig, width: int) -> None:
        super().__init__()
        self.feed_forward = build_feed_forward(config.feed_forward, width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Apply the network to each token."""
        del cache
        if context.recompute:
            return checkpoint(self.feed_forward, x_BTD, use_reentrant=False), {}
        return self.feed_forward(x_BTD), {}
