"""Initial weights, each tensor from a generator of its own.

A tensor's seed is a hash of (run seed, its name, expert number), so a weight depends on neither the
order of construction nor on how many other experts live in this process. Linear maps and the embedding
N(0, 0.02), biases 0, projections into the residual stream N(0, 0.02 / sqrt(2 L)), norms identity
(GPT-2); stacked experts as E separate networks.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from sra_ds.config.model import CosineRouterConfig, RandomRouterConfig
from sra_ds.model.embeddings.token import TokenEmbedding
from sra_ds.moe.experts import GroupedExperts, ResidualLinear
from sra_ds.moe.routers import CosineRouter, LinearRouter, RandomRouter

STD = 0.02


def generator(seed: int, *path: object) -> torch.Generator:
    """A CPU generator for one tensor, seeded by the hash of (seed, path)."""
    text = "/".join(map(str, (seed, *path)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer of a `LanguageModel` its initial value."""
    residual_std = STD / math.sqrt(2 * len(model.blocks))  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            _normal(
                module.weight,
                residual_std if isinstance(module, ResidualLinear) else STD,
                seed,
                name,
            )
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, TokenEmbedding):
            _normal(module.weight, STD, seed, name)
        elif isinstance(module, GroupedExperts):
            _experts(module, residual_std, seed, name)
        else:
            initialise_router(module, seed, name)


def _normal(weight: Tensor, std: float, seed: int, *path: object) -> None:
    weight.copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator(seed, *path)))


def _experts(module: GroupedExperts, residual_std: float, seed: int, name: str) -> None:
    for row, expert in enumerate(module.expert_ids):
        _normal(module.up_weight[row], STD, seed, name, "up", expert)
        _normal(module.down_weight[row], residual_std, seed, name, "down", expert)
        if module.gate_weight is not None:
            _normal(module.gate_weight[row], STD, seed, name, "gate", expert)
    for bias in (module.up_bias, module.down_bias):
        if bias is not None:
            bias.zero_()


@torch.no_grad()
def initialise_router(module: nn.Module, seed: int, name: str) -> None:
    """Give a router its initial values; one without parameters has none."""
    if not isinstance(module, (CosineRouter, RandomRouter, LinearRouter)):
        return
    module.selection_bias_E.zero_()
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
    anchors = torch.empty(module.anchors.shape)
    if isinstance(config, CosineRouterConfig) and config.anchors == "kaiming":
        nn.init.kaiming_uniform_(anchors, a=math.sqrt(5), generator=generator(seed, name))
    else:  # `data` starts here, too, and is seeded by the trainer
        nn.init.orthogonal_(anchors, generator=generator(seed, name))
    module.anchors.copy_(anchors)
