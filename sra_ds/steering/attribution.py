"""Which experts write words, and what changing them would cost: all experts by one backward pass.

    slope   d / dc [log P(words) - log P(other words)] at c = 1, the expert's gate times c: the mean over
            places (see `effect`); without other words d / dc P(words)
    cost    F = mean of (d / dc log P(next token))^2, the Fisher information of the gate: on neutral text
            gates times 1 + d cost about F d^2 / 2 nats of KL divergence per token

Next tokens are drawn from the model, so F needs no labels; choices that flip in later layers are not in
it. The interval of a slope resamples units, p flips their signs, adjusted over all experts. `detect`
finds what reads something, this what writes it, `fit` makes a card of it.
Letters: B units (windows or prompts), T positions, N = B x T tokens, L layers, E experts, K choices,
P experts of all layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sra_ds.analysis.statistics import MANY_RESAMPLES, benjamini_hochberg, draws_of_null
from sra_ds.data.loader import IGNORED, Batch
from sra_ds.heap import giving_back
from sra_ds.model.language_model import LanguageModel
from sra_ds.moe.routing import Routing
from sra_ds.steering.effect import WordSets

SEED = 0
DRAWS_AT_ONCE = 1000
TINY = 1e-300
DAMPING = 0.1
"""In medians of F: an expert that hardly any token of the neutral text uses is not free."""

Floats = NDArray[np.float64]


@contextmanager
def gate_factors(
    model: LanguageModel, units: int, gates_LE: Floats | None = None
) -> Iterator[list[Tensor]]:
    """For a while every gate is multiplied by the factor of its unit and expert, B x E for each routed
    layer, through which gradients flow: ones, or those of `gates_LE` for every unit."""
    weight = next(model.parameters())
    device, dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
    factors = []
    for layer, router in enumerate(model.routers()):
        experts = int(router.slots)
        own_E = np.ones(experts) if gates_LE is None else gates_LE[layer, :experts]
        factor_E = torch.tensor(own_E, dtype=dtype, device=device)
        factors.append(factor_E.repeat(units, 1).requires_grad_())

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


def gate_slopes(
    model: LanguageModel,
    batches: Sequence[Batch],
    words: WordSets,
    gates_LE: Floats | None = None,
) -> Floats:
    """Slope of every unit in every gate, B x L x E, where gates are multiplied by `gates_LE` already."""

    def measure(logits_BTV: Tensor, counted_BT: Tensor) -> Tensor:
        own_BT = logits_BTV[..., words.own_S].logsumexp(-1)
        if words.others_S:
            value_BT = own_BT - logits_BTV[..., words.others_S].logsumexp(-1)
        else:
            value_BT = (own_BT - logits_BTV.logsumexp(-1)).exp()
        return value_BT / counted_BT.sum(-1, keepdim=True)

    parts = [_gradient(model, batch, measure, gates_LE) for batch in _each(batches, "slopes")]
    return np.concatenate(parts)


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
    for batch in _each(batches, "costs"):
        own_LE = (_gradient(model, batch, drawn) ** 2).sum(0)
        squares_LE = squares_LE + own_LE if tokens else own_LE
        tokens += int((batch.targets_BT != IGNORED).sum())
    return squares_LE / tokens


def _each(batches: Sequence[Batch], what: str) -> Iterator[Batch]:
    return iter(tqdm(giving_back(batches), what, len(batches), leave=False))


def _gradient(
    model: LanguageModel,
    batch: Batch,
    measure: Callable[[Tensor, Tensor], Tensor],
    gates_LE: Floats | None = None,
) -> Floats:
    """Gradient, B x L x E, of the sum over each unit's counted places of measure(logits, counted); NaN
    for an expert that a layer lacks and another has (a ghost that is awake)."""
    own = batch.to(next(model.parameters()).device)
    counted_BT = own.targets_BT != IGNORED
    with gate_factors(model, len(own.ids_BT), gates_LE) as factors:
        logits_BTV = model(own.ids_BT, None, own.document_ids_BT, own.valid_BT).logits
        assert logits_BTV is not None
        values_BT = torch.where(counted_BT, measure(logits_BTV, counted_BT), 0.0)
        gradients = torch.autograd.grad(values_BT.sum(), factors)
    by_expert = [gradient_BE.T for gradient_BE in gradients]
    found_ELB = pad_sequence(by_expert, padding_value=torch.nan)
    found_BLE: Floats = found_ELB.permute(2, 1, 0).double().cpu().numpy()
    return found_BLE


def attribute(slopes_BLE: Floats, cost_LE: Floats) -> list[dict[str, Any]]:
    """Experts with slope, cost (damped) and gain, the change of the words for a small fixed divergence:
    |slope| / sqrt(cost), the largest first."""
    units, _, experts = slopes_BLE.shape
    place_P = np.flatnonzero(~np.isnan(cost_LE))
    flat_BP = slopes_BLE.reshape(units, -1)[:, place_P]
    mean_P = flat_BP.mean(0)
    rng = np.random.default_rng(SEED)
    draws, beyond_P = draws_of_null(len(place_P)), np.zeros(len(place_P))
    for start in range(0, draws, DRAWS_AT_ONCE):
        signs_RB = rng.choice((-1.0, 1.0), (min(DRAWS_AT_ONCE, draws - start), units))
        flipped_RP = signs_RB @ flat_BP / units
        beyond_P += (np.abs(flipped_RP) >= np.abs(mean_P) * (1 - 1e-9)).sum(0)
    p_P = (1 + beyond_P) / (1 + draws)
    adjusted_P = benjamini_hochberg(p_P.tolist())
    low_P, high_P = np.full((2, len(mean_P)), np.nan)
    if units > 1:
        drawn_RP = (
            rng.multinomial(units, np.full(units, 1 / units), MANY_RESAMPLES) @ flat_BP / units
        )
        low_P, high_P = np.quantile(drawn_RP, [0.025, 0.975], axis=0)
    cost_P = cost_LE.ravel()[place_P]
    cost_P = cost_P + max(DAMPING * float(np.median(cost_P)), TINY)
    gain_P = np.abs(mean_P) / np.sqrt(cost_P)
    return [
        {
            "layer": int(place_P[at] // experts),
            "expert": int(place_P[at] % experts),
            "slope": float(mean_P[at]),
            "low": None if units < 2 else float(low_P[at]),
            "high": None if units < 2 else float(high_P[at]),
            "cost": float(cost_P[at]),
            "gain": float(gain_P[at]),
            "p": float(p_P[at]),
            "p_adjusted": adjusted_P[at],
        }
        for at in np.argsort(-gain_P, kind="stable")
    ]
