"""Routed experts as a channel: flattens the batch to tokens and back."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.context import Context
from sra_ds.model.expert_blocks import BlockBackend
from sra_ds.model.facts import Facts
from sra_ds.moe.layer import Given, MoELayer


class MoEChannel(nn.Module):
    """x_BTD, context -> (y_BTD, facts), of which `routing` is the `Routing`."""

    def __init__(self, config: MoEChannelConfig, width: int) -> None:
        super().__init__()
        self.blocks = config.expert_kind == "block"
        self.moe = MoELayer(config, width, BlockBackend(config, width) if self.blocks else None)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Each token on its own: no token depends on another's route. Experts that are blocks see the
        tokens before theirs as the mixer does."""
        valid, mixed = context.valid_BT, context.mixed_BTD
        outputs_TED = self._outputs(x_BTD, context, cache) if self.blocks else None
        given = Given(
            None if valid is None else valid.flatten(),
            context.ids_BT.flatten(),
            context.keep_scores,
            context.recompute,
            None if mixed is None else mixed.flatten(0, 1),
            outputs_TED,
        )
        out_TD, facts = self.moe(x_BTD.flatten(0, 1), given)
        return out_TD.view_as(x_BTD), facts

    def _outputs(self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        """Every expert's output for every token, N x E x D."""
        outputs_TED: Tensor
        if context.recompute:
            outputs_TED = checkpoint(self.moe.backend, x_BTD, context, use_reentrant=False)
        else:
            outputs_TED = self.moe.backend(x_BTD, context, cache)
        return outputs_TED
