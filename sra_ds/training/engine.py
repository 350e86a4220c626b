"""The one place where DeepSpeed takes over the model."""

from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from sra_ds.config import Recipe
from sra_ds.config.training import AdamWConfig
from sra_ds.model.language_model import LanguageModel

NO_DECAY_SUFFIXES = ("bias", "anchors", "temperature")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter once: with decay, and without (biases, norms, anchors, temperatures)."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = id(parameter) in norms or name.endswith(NO_DECAY_SUFFIXES)
            (plain if spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; AdamW runs fused, on the CPU too."""
    config = recipe.training.optimizer
    groups = parameter_groups(model, config.weight_decay)
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def build_engine(model: LanguageModel, recipe: Recipe, ds_config: dict[str, Any]) -> Any:
    """A `DeepSpeedEngine` around the model, at any ZeRO stage."""
    model.recompute = recipe.training.activation_checkpointing
    if recipe.training.compile:
        for block in model.blocks:
            block.compile()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(model, recipe), config=ds_config
    )
    for parameter in model.embedding.tied_parameters():  # type: ignore[operator]
        if hasattr(parameter, "ds_id"):  # ZeRO-3: the head reads the embedding's table
            deepspeed.zero.register_external_parameter(model.head, parameter)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """For every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def full_state(engine: Any) -> dict[str, Tensor]:
    """All weights and persistent buffers on the CPU of rank 0; empty on other ranks.

    Collective at ZeRO-3, where it gathers one parameter at a time.
    """
    keep = engine.global_rank == 0
    state: dict[str, Tensor] = {}
    persistent = engine.module.state_dict().keys()
    parameters = dict(engine.module.named_parameters())
    for name in persistent:
        if name in parameters:
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                if keep:
                    state[name] = parameters[name].detach().cpu().clone()
        elif keep:
            state[name] = engine.module.get_buffer(name).detach().cpu().clone()
    return state


def plain_gradient_norm(engine: Any) -> float | None:
    """Norm of the gradients about to be applied, where DeepSpeed will not tell it (stage 0 without
    clipping); None elsewhere."""
    if engine.zero_optimization() or engine.gradient_clipping():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))
