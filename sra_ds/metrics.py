"""Summaries of routing and halting: pure functions of facts, for logs, progress bars and reports."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence

from sra_ds.ops.precision import widened

DEAD_SHARE = 1e-4
HISTOGRAM_EDGES = (0.0, *(2.0**power for power in range(-6, 3)))
"""Upper bounds of the bins of `load_histogram`, 0, 1/64, 1/32, ... 4; the last bin has none."""


def is_dead(load_E: Tensor, tokens: float | None = None) -> Tensor:
    """Whether each expert, in the last dimension, has fewer than 1e-4 of its layer's routes (v1), or with
    `tokens` was chosen by fewer than 1e-4 of those (v2), which is k times laxer."""
    return load_E < DEAD_SHARE * (load_E.sum(-1, keepdim=True) if tokens is None else tokens)


def load_summary(load_E: Tensor, tokens: float) -> dict[str, float]:
    """Evenness of a layer's load: dead experts, coefficient of variation, violation, entropy share.

    `max_violation` is the fullest expert's load over the mean, minus 1; `effective_experts` is
    exp(entropy of the shares) / E, 1 when even.
    """
    load = load_E.cpu().double()
    share = load / load.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    mean = load.mean().clamp(min=1e-12)
    return {
        "dead_by_routes": int(is_dead(load).sum()),
        "dead_by_tokens": int(is_dead(load, tokens).sum()),
        "load_cv": float(load.std(correction=0) / mean),
        "max_violation": float(load.max() / mean - 1),
        "min_share": float(share.min()),
        "max_share": float(share.max()),
        "effective_experts": float(entropy.exp() / len(load)),
    }


def stacked_loads(loads: Sequence[Tensor]) -> Tensor:
    """The loads of all layers, L x S, in float64 on the CPU; layers with fewer experts to choose from
    (less ghosts awake) end in zeros."""
    return pad_sequence([load_E.detach() for load_E in loads], batch_first=True).cpu().double()


def layers_summary(
    load_LE: Tensor, tokens: float, slots_L: Sequence[int] | None = None
) -> dict[str, Any]:
    """`load_summary` of every layer and over all of them; counts of dead experts are summed, and
    `dead_fraction` takes the stricter definition (fewer than 1e-4 of a layer's routes). `slots_L` says
    how many of a layer's experts could be chosen; None: all."""
    slots_L = [load_LE.shape[1]] * len(load_LE) if slots_L is None else slots_L
    layers = [
        load_summary(load_E[:slots], tokens) for load_E, slots in zip(load_LE, slots_L, strict=True)
    ]
    dead = {
        f"dead_{n}": sum(int(x[f"dead_{n}"]) for x in layers) for n in ("by_routes", "by_tokens")
    }
    return {
        **dead,
        "dead_fraction": dead["dead_by_routes"] / max(sum(slots_L), 1),
        "load_cv": sum(layer["load_cv"] for layer in layers) / max(len(layers), 1),
        "max_violation": max((layer["max_violation"] for layer in layers), default=0.0),
        "per_layer": layers,
    }


def load_histogram(load_E: Tensor) -> list[float]:
    """Share of the experts per bin of load over mean load: none at all, up to 1/64, then doubling bins up
    to 4, and above. Bins include their upper bound, so an even load is all in the one that ends at 1."""
    load = load_E.cpu().double()
    ratio_E = load / load.mean().clamp(min=1e-12)
    bins_E = torch.bucketize(ratio_E, torch.tensor(HISTOGRAM_EDGES, dtype=ratio_E.dtype))
    counts = torch.bincount(bins_E, minlength=len(HISTOGRAM_EDGES) + 1)
    shares: list[float] = (counts / len(load)).tolist()
    return shares


def anchor_drift(now_ED: Tensor, start_ED: Tensor) -> float:
    """Mean over experts of 1 - cos(anchor now, anchor then): 0 for none, 1 for right angles, 2 for the
    opposite; as half the squared distance of the unit vectors, which rounding never makes negative."""
    apart_ED = normalize(now_ED.cpu().double(), dim=-1) - normalize(start_ED.cpu().double(), dim=-1)
    return float(apart_ED.square().sum(-1).mean() / 2)


def halting_summary(entropy_IBT: Tensor, iterations_BT: Tensor) -> dict[str, Any]:
    """One layer's iterations over real tokens (not NaN): their mean, the share of tokens by number of
    iterations 1 .. I (rounded where it is an expectation), and of each iteration's relative entropy
    the mean, the 10th and 90th percentiles and the share of tokens that reached it; None of none."""
    counts = iterations_BT[iterations_BT.isfinite()].cpu().double()
    rounded = counts.round().long().clamp(min=1)
    shares = torch.bincount(rounded - 1, minlength=len(entropy_IBT)) / max(len(counts), 1)
    quantiles = torch.tensor([0.1, 0.9], dtype=torch.float64, device=counts.device)
    rows = []
    for entropy_BT in entropy_IBT:
        found = entropy_BT[entropy_BT.isfinite()].cpu().double()
        low, high = found.quantile(quantiles).tolist() if len(found) else (None, None)
        mean = float(found.mean()) if len(found) else None
        reached = len(found) / max(len(counts), 1)
        rows.append({"mean": mean, "p10": low, "p90": high, "reached": reached})
    mean = float(counts.mean()) if len(counts) else None
    return {"iterations": mean, "shares": shares.tolist(), "entropy": rows}


def specialisation(outputs_END: Tensor) -> float:
    """1 minus the mean linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of each two experts' outputs
    for the same N tokens: 0 where all say the same up to rotation and size, towards 1 where what they say
    has nothing in common. Cosines of weights would say 1 of any random matrices."""
    outputs = widened(outputs_END)
    centred_END = outputs - outputs.mean(1, keepdim=True)

    def shared(first_ND: Tensor, second_ND: Tensor) -> float:
        return float((first_ND.T @ second_ND).square().sum())

    own = [shared(each_ND, each_ND) ** 0.5 for each_ND in centred_END]
    similar = [
        shared(centred_END[i], centred_END[j]) / max(own[i] * own[j], 1e-300)
        for i, j in combinations(range(len(own)), 2)
    ]
    return 1.0 - float(sum(similar)) / len(similar)
