"""Routed experts as a channel: flattens the batch to tokens and back."""

from typing import Any

from torch import Tensor, nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.context import Context
from sra_ds.moe.layer import MoELayer


class MoEChannel(nn.Module):
    """x_BTD, context -> (y_BTD, {"routing": Routing})."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        self.moe = MoELayer(config, width)

    def forward(self, x_BTD: Tensor, context: Context) -> tuple[Tensor, dict[str, Any]]:
        """Each token on its own: no token depends on another's route."""
        valid = context.valid_BT
        out_TD, routing = self.moe(
            x_BTD.flatten(0, 1),
            None if valid is None else valid.flatten(),
            context.ids_BT.flatten(),
            context.keep_scores,
            context.recompute,
        )
        return out_TD.view_as(x_BTD), {"routing": routing}
