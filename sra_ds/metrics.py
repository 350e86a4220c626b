"""Summaries of routing: pure functions of facts, for logs, progress bars and reports."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sra_ds.moe.routing import Routing

DEAD_SHARE = 1e-4


def over_ranks(routings: Sequence[Routing]) -> list[Routing]:
    """Routing statistics of all data ranks instead of this one, with this rank's gradient.

    p = p_global.detach() + p_local - p_local.detach(): after gradients are averaged over ranks this is
    the gradient of a loss of the global mean, so auxiliary losses do not depend on the world size. One
    collective for all layers. Without processes the statistics are returned as they are.
    """
    if not (
        dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and routings
    ):
        return list(routings)
    world = dist.get_world_size()
    local = [
        torch.cat([r.load_E, r.mean_probs_E.detach() * r.valid_count, r.valid_count.view(1)])
        for r in routings
    ]
    flat = torch.cat(local)
    dist.all_reduce(flat)
    result = []
    for routing, summed in zip(routings, flat.split([len(part) for part in local]), strict=True):
        experts = len(routing.load_E)
        load_E, probs_E, count = summed.split([experts, experts, 1])
        mean_E = probs_E / count.clamp(min=1)
        # the loss is divided by the mean count of a rank, as gradients are averaged, not summed
        own_E = routing.mean_probs_E * (routing.valid_count * world / count.clamp(min=1))
        result.append(
            routing._replace(
                load_E=load_E,
                mean_probs_E=mean_E + own_E - own_E.detach(),
                valid_count=count.squeeze(0) / world,
            )
        )
    return result


def dead_experts(load_E: Tensor, tokens: float) -> dict[str, int]:
    """Dead experts of a layer at both published definitions.

    `by_routes` (v1): fewer than 1e-4 of the layer's routes. `by_tokens` (v2): chosen by fewer than 1e-4
    of the tokens, which is k times laxer.
    """
    return {
        "by_routes": int((load_E < DEAD_SHARE * load_E.sum()).sum()),
        "by_tokens": int((load_E < DEAD_SHARE * tokens).sum()),
    }


def load_summary(load_E: Tensor, tokens: float) -> dict[str, float]:
    """Evenness of a layer's load: dead experts, coefficient of variation, violation, entropy share.

    `max_violation` is the fullest expert's load over the mean, minus 1; `effective_experts` is
    exp(entropy of the shares) / E, 1 when even.
    """
    load = load_E.double()
    share = load / load.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    mean = load.mean().clamp(min=1e-12)
    return {
        **{f"dead_{name}": count for name, count in dead_experts(load, tokens).items()},
        "load_cv": float(load.std(correction=0) / mean),
        "max_violation": float(load.max() / mean - 1),
        "min_share": float(share.min()),
        "max_share": float(share.max()),
        "effective_experts": float(entropy.exp() / len(load)),
    }
