"""Parameters, counted from the built model (on the meta device, so any size is free)."""

from typing import Any

from torch import nn

from sra_ds.config.model import MoEChannelConfig
from sra_ds.model.channels.prime_masked import SparseLinear
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.experts import GroupedExperts
from sra_ds.moe.routers import ROUTERS

PARTS = ("embedding_head", "attention", "experts", "memory", "router", "norms")


def count_parameters(model: LanguageModel, top_k: int | None = None) -> dict[str, Any]:
    """Total and active parameters, split by part. Of a sparse matrix only the live weights count.

    Active: what one token uses, i.e. `top_k` of E experts (ghosts among them or not) and all else; none
    given: as many as at the end of training. Routers are listed apart and `active` leaves them out as
    published counts do; `active_with_anchors` has them.
    """
    channel = model.config.channel
    total = dict.fromkeys(PARTS, 0)
    active_experts = 0.0
    ghosts = [ghost for layer in model.routed_layers() for ghost in layer.ghosts]
    for module in model.modules():
        size = _size(module)
        part = _part(module, model)
        total[part] += size
        if any(module is ghost for ghost in ghosts):
            continue
        if isinstance(module, GroupedExperts) and isinstance(channel, MoEChannelConfig):
            active_experts += size * (top_k or channel.top_k) / channel.experts
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


def _size(module: nn.Module) -> int:
    if isinstance(module, SparseLinear):
        return module.live + (0 if module.bias is None else module.bias.numel())
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _part(module: nn.Module, model: LanguageModel) -> str:
    blocks: list[Any] = list(model.blocks)
    owners = {
        "memory": [block.memory for block in blocks if block.memory is not None],
        "embedding_head": [model.embedding, model.head],
        "attention": [block.mixer for block in blocks],
    }
    if isinstance(module, nn.LayerNorm):
        return "norms"
    for part, own in owners.items():
        if any(module is inner for owner in own for inner in owner.modules()):
            return part
    return "router" if isinstance(module, tuple(ROUTERS.values())) else "experts"


def live_share(model: LanguageModel) -> float | None:
    """Share of the entries of sparse matrices that hold a weight; None for a model without any."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    if not sparse:
        return None
    return sum(m.live for m in sparse) / sum(m.rows * m.columns for m in sparse)
