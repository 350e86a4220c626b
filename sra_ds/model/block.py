"""One pre-LN block: x + mixer(norm(x)), then x + channel(norm(x)) (+ memory(norm(x)))."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sra_ds.config.model import ModelConfig
from sra_ds.model.channels import CHANNELS
from sra_ds.model.context import Context
from sra_ds.model.facts import Facts, merged
from sra_ds.model.memories import MEMORIES
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
        memory = MEMORIES.get(type(config.memory))
        self.memory = None if memory is None else memory(config.memory, config.width)

    def forward(
        self, x_BTD: Tensor, context: Context, cache: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Facts]:
        """Facts are the parts' own, plus the sizes of the stream and of what is added to it."""
        mixed_BTD, mixer_facts = _run(self.mixer, self.mixer_norm(x_BTD), context, cache)
        x_BTD = x_BTD + mixed_BTD
        h_BTD = self.channel_norm(x_BTD)
        known = context._replace(mixed_BTD=mixed_BTD)
        update_BTD, channel_facts = self.channel(h_BTD, known, cache)
        sizes: Facts = {"stream_rms": _rms(x_BTD), "channel_rms": _rms(update_BTD)}
        memory_facts: Facts = {}
        if self.memory is not None:
            recalled_BTD, memory_facts = _run(self.memory, h_BTD, context, cache)
            sizes["memory_rms"] = _rms(recalled_BTD)
            update_BTD = update_BTD + recalled_BTD
        facts = merged(mixer_facts, channel_facts, memory_facts, sizes)
        return x_BTD + update_BTD, facts


def _run(part: nn.Module, h_BTD: Tensor, context: Context, cache: Any) -> tuple[Tensor, Facts]:
    """A part's result, computed again for the backward pass where the context asks for it."""
    found: tuple[Tensor, Facts]
    if context.recompute:
        found = checkpoint(part, h_BTD, context, use_reentrant=False)
    else:
        found = part(h_BTD, context, cache)
    return found


def _rms(x: Tensor) -> Tensor:
    return at_least_float32(x.detach()).square().mean().sqrt()
