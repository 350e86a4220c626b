"""Summaries of routing: pure functions of facts, for logs, progress bars and reports."""

from typing import Any

from torch import Tensor

DEAD_SHARE = 1e-4


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


def layers_summary(load_LE: Tensor, tokens: float) -> dict[str, Any]:
    """`load_summary` of every layer and over all of them; counts of dead experts are summed, and
    `dead_fraction` takes the stricter definition (fewer than 1e-4 of a layer's routes)."""
    layers = [load_summary(load_E, tokens) for load_E in load_LE]
    dead = {
        f"dead_{n}": sum(int(x[f"dead_{n}"]) for x in layers) for n in ("by_routes", "by_tokens")
    }
    return {
        **dead,
        "dead_fraction": dead["dead_by_routes"] / max(load_LE.numel(), 1),
        "load_cv": sum(layer["load_cv"] for layer in layers) / max(len(layers), 1),
        "max_violation": max((layer["max_violation"] for layer in layers), default=0.0),
        "per_layer": layers,
    }
