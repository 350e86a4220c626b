"""Losses: pure functions of what a forward pass returned. Nothing here holds or changes state.

    total = cross-entropy + w_balance * balance + w_dispersion * dispersion + w_z * z
            + w_ponder * iterations + w_entropy * entropy + w_memory * size + w_supervision * early
            + w_orthogonality * overlap + w_ghost * error + w_wavelet * error of filters

with each term the mean over the layers that have it; those of the last two lines are penalties that parts
of the model return. Equations: SRA v1 (arXiv 2509.14255v1) for cv2, signed
and z, SRA v2 for bandpass and elastic, Fedus et al. 2021 (arXiv 2101.03961) for switch. Routing
statistics are over valid tokens; when data is split over processes they go through
`sra_ds.training.processes.over_ranks` first.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sra_ds.config.losses import (
    BalanceConfig,
    BandpassBalanceConfig,
    Cv2BalanceConfig,
    DispersionConfig,
    ElasticBalanceConfig,
    LogMeanExpDispersionConfig,
    LossesConfig,
    NoTerm,
    SignedDispersionConfig,
    SquaredDispersionConfig,
    SwitchBalanceConfig,
)
from sra_ds.moe.routing import Routing

EPS = 1e-8


def auxiliary_losses(
    routings: Sequence[Routing],
    penalties: Mapping[str, Sequence[Tensor]],
    config: LossesConfig,
    tokens: Tensor | float,
) -> dict[str, tuple[Tensor, float]]:
    """(raw value, weight) of every active term, each the mean over the layers that have it; penalties
    are sums over `tokens`."""
    return {**_routing_terms(routings, config), **_penalty_terms(penalties, config, tokens)}


def _penalty_terms(
    penalties: Mapping[str, Sequence[Tensor]], config: LossesConfig, tokens: Tensor | float
) -> dict[str, tuple[Tensor, float]]:
    weights = {
        "ponder": config.ponder_weight,
        "entropy": config.entropy_weight,
        "memory": config.memory_weight,
        "supervision": config.supervision_weight,
        "orthogonality": config.orthogonality_weight,
        "ghost": config.ghost_weight,
        "wavelet": config.wavelet_weight,
    }
    return {
        name: (torch.stack(list(values)).mean() / tokens, weights[name])
        for name, values in penalties.items()
        if weights[name] > 0
    }


def _routing_terms(
    routings: Sequence[Routing], config: LossesConfig
) -> dict[str, tuple[Tensor, float]]:
    terms: dict[str, tuple[Tensor, float]] = {}
    if not routings:
        return terms
    if not isinstance(config.balance, NoTerm):
        values = [balance_loss(routing, config.balance) for routing in routings]
        terms["balance"] = (torch.stack(values).mean(), config.balance.weight)
    grams = [r.anchor_gram_EE for r in routings if r.anchor_gram_EE is not None]
    if not isinstance(config.dispersion, NoTerm) and grams:
        values = [dispersion_loss(gram, config.dispersion) for gram in grams]
        terms["dispersion"] = (torch.stack(values).mean(), config.dispersion.weight)
    if config.z_weight > 0:
        values = [z_loss(routing) for routing in routings]
        terms["z"] = (torch.stack(values).mean(), config.z_weight)
    return terms


def total_loss(cross_entropy: Tensor, terms: dict[str, tuple[Tensor, float]]) -> Tensor:
    """Cross-entropy plus the weighted auxiliary terms."""
    total = cross_entropy
    for value, weight in terms.values():
        total = total + weight * value
    return total


def balance_loss(routing: Routing, config: BalanceConfig) -> Tensor:
    """How unevenly one layer uses its experts, by mean probability or by top-k load share."""
    share_E = routing.mean_probs_E
    if config.of == "load":  # type: ignore[union-attr]
        share_E = load_share(routing) + share_E - share_E.detach()
    loss: Tensor = BALANCE_LOSSES[type(config)](share_E, routing, config)
    return loss


def load_share(routing: Routing) -> Tensor:
    """Each expert's share of the routes; sums to 1."""
    return routing.load_E / routing.load_E.sum().clamp(min=1)


def _cv2(share_E: Tensor, routing: Routing, config: Cv2BalanceConfig) -> Tensor:
    """E * Var(p) / (mean(p)^2 + eps), biased variance."""
    del routing, config
    return len(share_E) * share_E.var(correction=0) / (share_E.mean() ** 2 + EPS)


def _switch(share_E: Tensor, routing: Routing, config: SwitchBalanceConfig) -> Tensor:
    """E * sum_e load share_e * p_e; 1 when even."""
    del config
    return len(share_E) * (load_share(routing) * share_E).sum()


def _bandpass(share_E: Tensor, routing: Routing, config: BandpassBalanceConfig) -> Tensor:
    """E^2 * mean(relu(low - p)^2 + relu(p - high)^2)."""
    del routing
    outside = F.relu(config.low - share_E).square() + F.relu(share_E - config.high).square()
    return len(share_E) ** 2 * outside.mean()


def _elastic(share_E: Tensor, routing: Routing, config: ElasticBalanceConfig) -> Tensor:
    """E^2 * mean(p - 1/E)^2 + stiffness * E^2 * mean(relu(p - ceiling)^2)."""
    del routing
    experts = len(share_E)
    spring = (share_E - 1 / experts).square().mean()
    stop = F.relu(share_E - config.ceiling).square().mean()
    return experts**2 * (spring + config.stiffness * stop)


BALANCE_LOSSES: dict[type[Any], Callable[..., Tensor]] = {
    Cv2BalanceConfig: _cv2,
    SwitchBalanceConfig: _switch,
    BandpassBalanceConfig: _bandpass,
    ElasticBalanceConfig: _elastic,
}


def dispersion_loss(gram_EE: Tensor, config: DispersionConfig) -> Tensor:
    """How far anchors are from lying apart, from their cosine matrix."""
    if len(gram_EE) == 1:
        return gram_EE.sum() * 0.0  # one anchor has nothing to lie apart from
    loss: Tensor = DISPERSION_LOSSES[type(config)](_off_diagonal(gram_EE), config)
    return loss


def _off_diagonal(gram_EE: Tensor) -> Tensor:
    """The E(E-1) cosines of different anchors."""
    experts = gram_EE.shape[0]
    return gram_EE.flatten()[1:].view(experts - 1, experts + 1)[:, :-1]


def _signed(cosines: Tensor, config: SignedDispersionConfig) -> Tensor:
    """mean cos = (|sum of anchors|^2 - E) / (E(E-1)): two antipodal clusters minimise it, too."""
    del config
    return cosines.mean()


def _squared(cosines: Tensor, config: SquaredDispersionConfig) -> Tensor:
    """mean cos^2, at least (E-D)/(D(E-1)) for E > D (Welch)."""
    del config
    return cosines.square().mean()


def _log_mean_exp(cosines: Tensor, config: LogMeanExpDispersionConfig) -> Tensor:
    """log mean exp(sharpness * cos) / sharpness."""
    scaled = config.sharpness * cosines.flatten()
    mean = scaled.logsumexp(0) - torch.log(scaled.new_tensor(float(scaled.numel())))
    return mean / config.sharpness


DISPERSION_LOSSES: dict[type[Any], Callable[..., Tensor]] = {
    SignedDispersionConfig: _signed,
    SquaredDispersionConfig: _squared,
    LogMeanExpDispersionConfig: _log_mean_exp,
}


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the scores over valid tokens."""
    return routing.lse_T.square().sum() / routing.valid_count.clamp(min=1)
