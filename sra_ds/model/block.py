"""One pre-LN block: x + mixer(norm(x)), then x + channel(norm(x))."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import ModelConfig
from sra_ds.model.channels import CHANNELS
from sra_ds.model.context import Context
from sra_ds.model.mixers import MIXERS
from sra_ds.ops.precision import at_least_float32


class Block(nn.Module):
    """x_BTD, context -> (x_BTD, facts)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.LayerNorm(config.width)
        self.mixer = MIXERS[type(config.mixer)](config.mixer, config.width)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel = CHANNELS[type(config.channel)](config.channel, config.width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Facts are the parts' own, plus the size of the channel's output and of the stream."""
        h_BTD = self.mixer_norm(x_BTD)
        if context.recompute:
            mixed_BTD, mixer_facts = checkpoint(self.mixer, h_BTD, context, use_reentrant=False)
        else:
            mixed_BTD, mixer_facts = self.mixer(h_BTD, context, cache)
        x_BTD = x_BTD + mixed_BTD
        update_BTD, channel_facts = self.channel(self.channel_norm(x_BTD), context)
        norms = {"stream_rms": _rms(x_BTD), "channel_rms": _rms(update_BTD)}
        return x_BTD + update_BTD, {**mixer_facts, **channel_facts, **norms}


def _rms(x: Tensor) -> Tensor:
    return at_least_float32(x.detach()).square().mean().sqrt()
