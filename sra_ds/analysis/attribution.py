"""Which experts write words, and what changing them would cost: all experts by one backward pass.

    slope   d / dc [log P(words) - log P(the other words)] at c = 1, the expert's gate times c: the mean
            over places (see `effect`); without other words that of log P(words)
    cost    F = mean of (d / dc log P(next token))^2, the Fisher information of the gate: on neutral text
            gates times 1 + d cost about F d^2 / 2 nats of KL divergence per token
    card    d = b slope / (F + damping), the largest change of the words for a divergence, that b sets, if
            gates act independently and changes are small (natural gradient, Amari 1998, diagonal)

Next tokens are drawn from the model, so F needs no labels; choices that flip in later layers are not in
it. The interval of a slope resamples units, p flips their signs, adjusted over all experts. `detect` finds
what reads something, this what writes it.
Letters: B units (windows or prompts), T positions, N = B x T tokens, L layers, E experts, K choices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
DAMPING = 0.1
"""In medians of F: an expert that hardly any token of the neutral text uses is not free."""

Floats = NDArray[np.float64]


class Attribution(NamedTuple):
    """Slopes of every unit in every gate, and what a change of each gate costs."""

    slopes_BLE: Floats
    cost_LE: Floats

    @property
    def gain_LE(self) -> Floats:
        """Change of the words for a small fixed divergence."""
        gain_LE: Floats = np.abs(self.slopes_BLE.mean(0)) / np.sqrt(self.damped_cost_LE)
        return gain_LE

    @property
    def damped_cost_LE(self) -> Floats:
        """F and the damping; positive."""
        damping = max(DAMPING * float(np.median(self.cost_LE)), np.finfo(np.float64).tiny)
        damped_LE: Floats = self.cost_LE + damping
        return damped_LE


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

    def log_odds(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
        own_BT = logits_BTV[..., words.own_S].logsumexp(-1)
        rest_BTS = logits_BTV[..., words.others_S] if words.others_S else logits_BTV
        means_BT: Tensor = own_BT - rest_BTS.logsumexp(-1)
        return means_BT / counted_BT.sum(-1, keepdim=True)

    return np.concatenate([_gradient(model, batch, log_odds) for batch in tqdm(batches, "slopes")])


def gate_cost(model: LanguageModel, batches: Sequence[Batch], seed: int = SEED) -> Floats:
    """Fisher information per token of every gate, L x E. The gradients of a window's tokens are summed
    before they are squared: for tokens drawn from the model they are uncorrelated."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
        log_probs_BTV = logits_BTV.log_softmax(-1)
        probs_NV = log_probs_BTV.detach().exp().flatten(0, 1).cpu()
        drawn_N1 = torch.multinomial(probs_NV, 1, generator=generator)
        drawn_BT1 = drawn_N1.view(*counted_BT.shape, 1).to(logits_BTV.device)
        return log_probs_BTV.gather(-1, drawn_BT1).squeeze(-1)

    squares_LE, tokens = np.zeros(0), 0
    for batch in tqdm(batches, "costs"):
        own_LE = (_gradient(model, batch, drawn) ** 2).sum(0)
        squares_LE = squares_LE + own_LE if tokens else own_LE
        tokens += int((batch.targets_BT != IGNORED).sum())
    return squares_LE / tokens


def _gradient(
    model: LanguageModel, batch: Batch, measure: Callable[[Tensor, Tensor], Tensor]
) -> Floats:
    """Gradient, B x L x E, of the sum over each unit's counted places of measure(logits, counted)."""
    own = batch.to(next(model.parameters()).device)
    counted_BT = own.targets_BT != IGNORED
    with gate_factors(model, len(own.ids_BT)) as factors:
        logits_BTV = model(own.ids_BT, None, own.document_ids_BT, own.valid_BT).logits
        assert logits_BTV is not None
        values_BT = torch.where(counted_BT, measure(logits_BTV, counted_BT), 0.0)
        gradients = torch.autograd.grad(values_BT.sum(), factors)
    found_BLE: Floats = torch.stack(gradients, 1).double().cpu().numpy()
    return found_BLE


def attribute(found: Attribution) -> list[dict[str, Any]]:
    """Experts by gain, the largest first, with slope and cost."""
    units, _, experts = found.slopes_BLE.shape
    flat_BP = found.slopes_BLE.reshape(units, -1)
    mean_P = flat_BP.mean(0)
    rng = np.random.default_rng(SEED)
    flipped_RP = rng.choice((-1.0, 1.0), (DRAWS, units)) @ flat_BP / units
    beyond_P = (np.abs(flipped_RP) >= np.abs(mean_P) - 1e-12).sum(0)
    p_P = (1 + beyond_P) / (1 + DRAWS)
    adjusted_P = benjamini_hochberg(p_P.tolist())
    drawn_RP = rng.multinomial(units, np.full(units, 1 / units), DRAWS) @ flat_BP / units
    low_P, high_P = np.quantile(drawn_RP, [0.025, 0.975], axis=0)
    gain_P, cost_P = found.gain_LE.ravel(), found.cost_LE.ravel()
    return [
        {
            "layer": int(at // experts),
            "expert": int(at % experts),
            "slope": float(mean_P[at]),
            "low": float(low_P[at]),
            "high": float(high_P[at]),
            "cost": float(cost_P[at]),
            "gain": float(gain_P[at]),
            "p": float(p_P[at]),
            "p_adjusted": adjusted_P[at],
        }
        for at in np.argsort(-gain_P, kind="stable")
    ]


def cheapest(
    found: Attribution, divergence: float, experts: int, lower: bool, name: str, made_for: str
) -> Steering:
    """A card that scales the gates of the `experts` of largest gain so that the words rise (or fall) as
    much as a KL divergence on neutral text, in nats per token, allows; no gate falls below 0."""
    slope_LE = found.slopes_BLE.mean(0) * (-1 if lower else 1)
    chosen = np.argsort(-found.gain_LE, axis=None, kind="stable")[:experts]
    slope_P, cost_P = slope_LE.ravel()[chosen], found.damped_cost_LE.ravel()[chosen]
    step_P = slope_P / cost_P
    expected = float((cost_P * step_P**2).sum() / 2)
    if expected > 0:
        step_P = step_P * np.sqrt(divergence / expected)
    places = zip(*np.unravel_index(chosen, slope_LE.shape), (1 + step_P).clip(min=0), strict=True)
    edits = tuple(Scale(layer=int(l), expert=int(e), by=float(by)) for l, e, by in places)
    return Steering(name=name, made_for=made_for, edits=edits)
