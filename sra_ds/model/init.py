"""Initial weights, each tensor from a generator of its own.

A tensor's seed is a hash of (run seed, its name, expert number), so a weight depends on neither the
order of construction nor on how many other experts live in this process. Linear maps and the embedding
N(0, 0.02), biases 0, projections into the residual stream N(0, 0.02 / sqrt(2 L)), norms identity
(GPT-2); stacked experts as E separate networks; sparse maps as dense ones of their rows' live inputs.
Parts that refine or add to another start at or near doing nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sra_ds.config.model import CosineRouterConfig, RandomRouterConfig
from sra_ds.layers import Linear, ResidualLinear, ZeroLinear
from sra_ds.model.channels.prime_masked import BlockLinear, MaskedLinear, SparseLinear
from sra_ds.model.embeddings.factorised import FactorisedEmbedding
from sra_ds.model.embeddings.prime_hilbert import PrimeHilbertEmbedding
from sra_ds.model.embeddings.spectral import (
    HybridEmbedding,
    Waves,
    first_frequencies,
    wave_basis,
)
from sra_ds.model.embeddings.token import TokenEmbedding
from sra_ds.model.expert_blocks import StackedBlocks
from sra_ds.model.heads.pre_manifest import PreManifestHead
from sra_ds.model.memories.fast import FastMemory
from sra_ds.model.memories.static import StaticMemory
from sra_ds.model.mixers.convolution import Convolution
from sra_ds.model.mixers.filters import LowPass, wavelet_taps
from sra_ds.model.mixers.resonance import Resonance
from sra_ds.model.mixers.wave_conv import BandGates
from sra_ds.moe.coupling import UNIT_WEIGHT, GraphRound, HypergraphRound
from sra_ds.moe.experts import GroupedExperts
from sra_ds.moe.routers import CosineRouter, LinearRouter, RandomRouter, ScoringRouter
from sra_ds.seeds import generator

STD = 0.02


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer of a `LanguageModel` its initial value."""
    residual_std = STD / math.sqrt(2 * len(model.blocks))  # type: ignore[arg-type]
    for name, module in model.named_modules():
        for kind, fill in INITIALISERS.items():
            if isinstance(module, kind):
                fill(module, residual_std, seed, name)


def _normal(weight: Tensor, std: float, seed: int, *path: object) -> None:
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator(seed, *path)))


def _orthogonal(weight: Tensor, scale: float, seed: int, *path: object) -> None:
    drawn = torch.empty(weight.shape)
    weight.copy_(nn.init.orthogonal_(drawn, scale, generator=generator(seed, *path)))


def _norm(module: nn.LayerNorm, residual_std: float, seed: int, name: str) -> None:
    del residual_std, seed, name
    module.reset_parameters()


def _linear(module: Linear, residual_std: float, seed: int, name: str) -> None:
    if isinstance(module, ZeroLinear):
        module.weight.zero_()
    else:
        std = residual_std if isinstance(module, ResidualLinear) else STD
        _normal(module.weight, std, seed, name)
    if module.bias is not None:
        module.bias.zero_()


def _sparse(module: SparseLinear, residual_std: float, seed: int, name: str) -> None:
    """A row with fewer live inputs has larger weights, so that outputs start at the dense map's size."""
    drawn_by = generator(module.config.pattern_seed, name)
    mask = module.make_mask(drawn_by.initial_seed())
    weight = torch.empty(mask.shape)
    _normal(weight, residual_std if module.residual else STD, seed, name)
    weight *= mask * (module.columns / mask.sum(1, keepdim=True)).sqrt()
    if isinstance(module, MaskedLinear):
        module.mask.copy_(mask)
        module.weight.copy_(weight)
    elif isinstance(module, BlockLinear):
        module.plan.place_N.copy_(module.make_plan().place_N)
        module.values.copy_(weight[mask])
    if module.bias is not None:
        module.bias.zero_()


def _token_embedding(module: TokenEmbedding, residual_std: float, seed: int, name: str) -> None:
    del residual_std
    _normal(module.weight, STD, seed, name)


def _factorised_embedding(
    module: FactorisedEmbedding, residual_std: float, seed: int, name: str
) -> None:
    del residual_std
    rank, width = module.map_RD.shape
    _normal(module.weight, STD * math.sqrt(width / min(rank, width)), seed, name)
    _orthogonal(module.map_RD, 1.0, seed, name, "map")


def _waves(module: Waves, residual_std: float, seed: int, name: str) -> None:
    """Amplitudes and phases of normal coefficients, either way, that give vectors of N(0, 0.02)."""
    del residual_std
    rows = module.amplitude_VH if module.polar else module.weight
    drawn_VM = torch.empty(len(rows), 2 * module.harmonics)
    _normal(drawn_VM, STD * math.sqrt(module.width / drawn_VM.shape[1]), seed, name, "waves")
    if module.own:
        _normal(module.weight[:, : module.own], STD, seed, name)
    if module.polar:
        cosine_VH, sine_VH = drawn_VM.chunk(2, -1)
        module.amplitude_VH.copy_(torch.hypot(cosine_VH, sine_VH))
        module.phase_VH.copy_(torch.atan2(sine_VH, cosine_VH))
    else:
        module.weight[:, module.own :].copy_(drawn_VM)
    if module.frequency_shift_H is not None:
        module.frequency_shift_H.zero_()
    else:
        whole_H = first_frequencies(module.harmonics, module.width, torch.device("cpu"))
        module.basis_MD.copy_(wave_basis(whole_H, module.width))
    if isinstance(module, HybridEmbedding):
        module.mixing_logit.fill_(math.log(module.config.ratio / (1 - module.config.ratio)))
        module.ramp.fill_(0.0 if module.config.ramp else 1.0)


def _prime_hilbert(
    module: PrimeHilbertEmbedding, residual_std: float, seed: int, name: str
) -> None:
    del residual_std
    _normal(module.weight, STD, seed, name)
    parts = module.subspaces_US.split(module.sizes, 1)
    for prime, part in zip(module.config.primes, parts, strict=True):
        _orthogonal(part, 1.0, seed, name, "subspace", prime)
    _normal(module.head_map_UD, module.head_map_UD.shape[1] ** -0.5, seed, name, "head")
    module.token_strength.fill_(1.0)
    module.position_strength.fill_(0.1)


def _resonance(module: Resonance, residual_std: float, seed: int, name: str) -> None:
    del residual_std
    if module.iterations == 1:
        return
    for head, weight in enumerate(module.retrieval_weight):
        _orthogonal(weight, 0.1, seed, name, "retrieval", head)
    module.update_gate.fill_(-2.0)
    module.sharpening.fill_(-4.0)


def _low_pass(module: LowPass, residual_std: float, seed: int, name: str) -> None:
    del residual_std, seed, name
    module.taps_FK.zero_()
    for row_K, family in zip(module.taps_FK, module.families, strict=True):
        taps_K = wavelet_taps(family)
        row_K[: len(taps_K)] = taps_K
    if module.learned_K is not None:
        module.learned_K.copy_(module.taps_FK[0])
    if module.choice_F is not None:
        module.choice_F.zero_()
        module.temperature.fill_(module.first_temperature)


def _band_gates(module: BandGates, residual_std: float, seed: int, name: str) -> None:
    """Open by one over the number of bands; the weights are those of any linear map."""
    del residual_std, seed, name
    module.bias.fill_(-math.log(module.bands - 1))


def _convolution(module: Convolution, residual_std: float, seed: int, name: str) -> None:
    """Each position sees itself, and hardly any other: taps of equal size learn 0.3 nats less."""
    del residual_std
    _normal(module.taps_KD, STD, seed, name, "taps")
    module.taps_KD[0] += 1


def _static_memory(module: StaticMemory, residual_std: float, seed: int, name: str) -> None:
    del residual_std
    _normal(module.values, 1.0, seed, name, "values")


def _fast_memory(module: FastMemory, residual_std: float, seed: int, name: str) -> None:
    del residual_std, seed, name
    module.decay_logit.fill_(math.log(module.config.decay / (1 - module.config.decay)))
    if module.start_state_HCC is not None:
        module.start_state_HCC.zero_()


def _pre_manifest(module: PreManifestHead, residual_std: float, seed: int, name: str) -> None:
    del residual_std, seed, name
    module.logit_scale.fill_(1.0)
    if module.config.steps:
        module.update_gate.fill_(-4.0)


def _experts(module: GroupedExperts, residual_std: float, seed: int, name: str) -> None:
    for row, expert in enumerate(module.expert_ids):
        _normal(module.up_weight[row], STD, seed, name, "up", expert)
        _normal(module.down_weight[row], residual_std, seed, name, "down", expert)
        if module.gate_weight is not None:
            _normal(module.gate_weight[row], STD, seed, name, "gate", expert)
    for bias in (module.up_bias, module.down_bias):
        if bias is not None:
            bias.zero_()


def _blocks(module: StackedBlocks, residual_std: float, seed: int, name: str) -> None:
    for expert in module.expert_ids:
        _normal(module.qkv_weight[expert], STD, seed, name, "qkv", expert)
        _normal(module.out_weight[expert], residual_std, seed, name, "out", expert)
    for bias in (module.qkv_bias, module.out_bias, module.norm_bias):
        bias.zero_()
    module.norm_scale.fill_(1.0)


def _graph_round(module: GraphRound, residual_std: float, seed: int, name: str) -> None:
    del residual_std, seed, name
    module.edge_logit_EE.fill_(-2.0)


def _hypergraph_round(module: HypergraphRound, residual_std: float, seed: int, name: str) -> None:
    del residual_std
    if module.asks_MD is not None:
        _normal(module.asks_MD, STD, seed, name, "asks")
    if module.raw_weight_M is not None:
        module.raw_weight_M.fill_(UNIT_WEIGHT)
    if module.config.incidence == "learned":
        for expert, row_M in enumerate(module.membership_EM):
            _normal(row_M, 1.0, seed, name, "membership", expert)
    else:
        module.incidence_EM.copy_(module.make_incidence())


@torch.no_grad()
def initialise_router(module: nn.Module, seed: int, name: str) -> None:
    """Give a router its initial values; one without scores has none."""
    if not isinstance(module, (CosineRouter, RandomRouter, LinearRouter)):
        return
    module.selection_bias_E.zero_()
    if module.ghosts:
        module.ghost_alpha_G.zero_()
    for ghost in range(module.ghosts):  # of the size that rows of an orthogonal or linear map have
        std = STD if isinstance(module, LinearRouter) else module.anchors.shape[1] ** -0.5
        _normal(module.ghost_anchor(ghost), std, seed, name, "ghost", ghost)
    if isinstance(module, LinearRouter):
        _normal(module.weight, STD, seed, name)
        if module.bias is not None:
            module.bias.zero_()
        return
    config = module.config
    if isinstance(config, RandomRouterConfig):
        module.temperature.fill_(config.temperature)
    elif isinstance(config, CosineRouterConfig):
        plain = config.temperature == "none"
        module.temperature.fill_(1.0 if plain else config.initial_temperature)
    if isinstance(config, CosineRouterConfig) and config.anchors == "kaiming":
        anchors = torch.empty(module.anchors.shape)
        nn.init.kaiming_uniform_(anchors, a=math.sqrt(5), generator=generator(seed, name))
        module.anchors.copy_(anchors)
    else:  # `data` starts here, too, and is seeded by the trainer
        _orthogonal(module.anchors, 1.0, seed, name)


def _router(module: nn.Module, residual_std: float, seed: int, name: str) -> None:
    del residual_std
    initialise_router(module, seed, name)


INITIALISERS: dict[type[nn.Module], Callable[[Any, float, int, str], None]] = {
    nn.LayerNorm: _norm,
    Linear: _linear,
    SparseLinear: _sparse,
    TokenEmbedding: _token_embedding,
    PrimeHilbertEmbedding: _prime_hilbert,
    FactorisedEmbedding: _factorised_embedding,
    Waves: _waves,
    Resonance: _resonance,
    LowPass: _low_pass,
    BandGates: _band_gates,
    Convolution: _convolution,
    StaticMemory: _static_memory,
    FastMemory: _fast_memory,
    PreManifestHead: _pre_manifest,
    GroupedExperts: _experts,
    StackedBlocks: _blocks,
    ScoringRouter: _router,
    GraphRound: _graph_round,
    HypergraphRound: _hypergraph_round,
}
"""Called with (module, standard deviation of what writes into the residual stream, seed, name)."""
