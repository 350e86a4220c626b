"""Parameters, counted from the built model (on the meta device, so any size is free)."""

from typing import Any

from torch import nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.experts import GroupedExperts
from sra_ds.moe.routers import ROUTERS


def count_parameters(model: LanguageModel) -> dict[str, Any]:
    """Total and active parameters, split by part.

    Active: what one token uses, i.e. `top_k` of E experts and all else. Routers are listed apart and
    `active` leaves them out as published counts do; `active_with_anchors` has them.
    """
    channel = model.config.channel
    total = dict.fromkeys(("embedding_head", "attention", "experts", "router", "norms"), 0)
    active_experts = 0.0
    for module in model.modules():
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        part = _part(module, model)
        total[part] += size
        if isinstance(module, GroupedExperts) and isinstance(channel, MoEChannelConfig):
            active_experts += size * channel.top_k / channel.experts
        elif part == "experts":
            active_experts += size
    active = {**total, "experts": round(active_experts)}
    without_router = sum(active.values()) - active["router"]
    return {
        "total": sum(total.values()),
        "active": without_router,
        "active_with_anchors": sum(active.values()),
        "total_by_part": total,
        "active_by_part": active,
        "feed_forward_and_router": active["experts"] + active["router"],
    }


def _part(module: nn.Module, model: LanguageModel) -> str:
    if isinstance(module, tuple(ROUTERS.values())):
        return "router"
    if isinstance(module, nn.LayerNorm):
        return "norms"
    if any(module is inner for inner in model.embedding.modules()):
        return "embedding_head"
    if any(module is inner for block in model.blocks for inner in block.mixer.modules()):  # type: ignore[union-attr]
        return "attention"
    return "experts"


def flops_per_token(model: LanguageModel, sequence_length: int) -> float:
    """Training FLOPs a token needs: 6 per active parameter plus 6 T D per layer for causal attention
    (half of the T x T products)."""
    counts = count_parameters(model)
    attention = 6 * sequence_length * model.config.width * model.config.layers
    return float(6 * counts["active_with_anchors"] + attention)
