"""Which experts write words: how fast their log odds change with each expert's gate, all experts at once.

    slope   d / dc [log P(words) - log P(the other words)] at c = 1, the expert's gate times c

the mean over places (see `effect`); without other words of log P(words). One backward pass with a factor
for every unit and expert gives every slope of every unit. The interval resamples units, p flips their
signs, adjusted over all experts. `detect` finds experts that read something, this those that write it.
Letters: B units (windows or prompts), T positions, N = B x T tokens, L layers, E experts, K choices.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from sra_ds.analysis.effect import WordSets
from sra_ds.analysis.statistics import benjamini_hochberg
from sra_ds.config.steering import Scale, Steering
from sra_ds.data.loader import IGNORED, Batch
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.routing import Routing

DRAWS = 999
SEED = 0

Floats = NDArray[np.float64]


@contextmanager
def gate_factors(model: LanguageModel, units: int) -> Iterator[list[Tensor]]:
    """For a while every gate is multiplied by the factor of its unit and expert, B x E ones for each
    routed layer, through which gradients flow."""
    device = next(model.parameters()).device
    factors = [
        torch.ones(units, int(router.experts), device=device, requires_grad=True)
        for router in model.routers()
    ]

    def hook(factor_BE: Tensor) -> Any:
        def multiply(module: nn.Module, arguments: Any, routing: Routing) -> Routing:
            ids_NK = routing.expert_ids_TK
            unit_N = torch.arange(len(ids_NK), device=device) // (len(ids_NK) // units)
            gates_NK = routing.gates_TK * factor_BE[unit_N[:, None], ids_NK]
            return routing._replace(gates_TK=gates_NK)

        return multiply

    handles = [
        router.register_forward_hook(hook(factor_BE))
        for router, factor_BE in zip(model.routers(), factors, strict=True)
    ]
    try:
        yield factors
    finally:
        for handle in handles:
            handle.remove()


def gate_slopes(model: LanguageModel, batches: Sequence[Batch], words: WordSets) -> Floats:
    """Slope of every unit in every gate, B x L x E."""
    parts = []
    for batch in tqdm(batches, "slopes", leave=False):
        own = batch.to(next(model.parameters()).device)
        counted_BT = own.targets_BT != IGNORED
        with gate_factors(model, len(own.ids_BT)) as factors:
            logits_BTV = model(own.ids_BT, None, own.document_ids_BT, own.valid_BT).logits
            assert logits_BTV is not None
            value_BT = _log_odds(logits_BTV, words)
            value_BT = torch.where(counted_BT, value_BT, 0.0) / counted_BT.sum(-1, keepdim=True)
            slopes = torch.autograd.grad(value_BT.sum(), factors)
        parts.append(torch.stack(slopes, 1).double().cpu().numpy())
    return np.concatenate(parts)


def attribute(slopes_BLE: Floats) -> list[dict[str, Any]]:
    """Experts by the size of their mean slope, the largest first."""
    mean_LE = slopes_BLE.mean(0)
    units = len(slopes_BLE)
    rng = np.random.default_rng(SEED)
    flat = slopes_BLE.reshape(units, -1)
    flipped_RP = rng.choice((-1.0, 1.0), (DRAWS, units)) @ flat / units
    beyond_P = (np.abs(flipped_RP) >= np.abs(mean_LE.ravel()) - 1e-12).sum(0)
    p_P = (1 + beyond_P) / (1 + DRAWS)
    adjusted_P = benjamini_hochberg(p_P.tolist())
    drawn_RP = rng.multinomial(units, np.full(units, 1 / units), DRAWS) @ flat / units
    low_P, high_P = np.quantile(drawn_RP, [0.025, 0.975], axis=0)
    order = np.argsort(-np.abs(mean_LE), axis=None, kind="stable")
    experts = mean_LE.shape[1]
    return [
        {
            "layer": int(at // experts),
            "expert": int(at % experts),
            "slope": float(mean_LE.ravel()[at]),
            "low": float(low_P[at]),
            "high": float(high_P[at]),
            "p": float(p_P[at]),
            "p_adjusted": adjusted_P[at],
        }
        for at in order
    ]


def steering_of(
    rows: Sequence[dict[str, Any]], strength: float, name: str, made_for: str
) -> Steering:
    """A card that scales the gates of these experts by 1 + strength x slope / largest slope, not below
    0: a positive strength raises the words, a negative one lowers them."""
    largest = max(abs(row["slope"]) for row in rows) or 1.0
    edits = tuple(
        Scale(
            layer=row["layer"],
            expert=row["expert"],
            by=max(0.0, 1 + strength * row["slope"] / largest),
        )
        for row in rows
    )
    return Steering(name=name, made_for=made_for, edits=edits)


def _log_odds(logits_BTV: Tensor, words: WordSets) -> Tensor:
    own_BT = logits_BTV[..., words.own_S].logsumexp(-1)
    rest_BTS = logits_BTV[..., words.others_S] if words.others_S else logits_BTV
    return own_BT - rest_BTS.logsumexp(-1)
