"""The one place where DeepSpeed takes over the model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import (
    split_params_into_different_moe_groups_for_optimizer,
    split_params_into_shared_and_expert_params,
)
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import pad

from sra_ds.config import Recipe
from sra_ds.config.training import AdamWConfig
from sra_ds.errors import ConfigError
from sra_ds.model.decay import decays
from sra_ds.model.language_model import LanguageModel
from sra_ds.ops.precision import widened


def parameter_groups(
    model: LanguageModel, weight_decay: float, anchor_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Every trainable parameter once, with decay and without (`sra_ds.model.decay`); experts that are
    spread over processes in groups of their own, as DeepSpeed wants them, and so each ghost, which has a
    learning rate of its own and no decay, and the anchors where they have one."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    apart = ghost_groups(model)
    if anchor_rate != 1:
        apart += anchor_groups(model, weight_decay, anchor_rate)
    theirs = {id(parameter) for group in apart for parameter in group["params"]}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in theirs:
            owner, _, name = path.rpartition(".")
            (decayed if decays(model.get_submodule(owner), name) else plain).append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
        *apart,
    ]
    groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in groups if group["params"]]


def anchor_groups(model: LanguageModel, weight_decay: float, rate: float) -> list[dict[str, Any]]:
    """The anchors of all routers, or the rows of linear ones, which decay."""
    found: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for router in model.routers():
        for name in ("anchors", "weight"):
            parameter = getattr(router, name, None)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                found[decays(router, name)].append(parameter)
    return [
        {"name": "anchors", "params": params, "weight_decay": weight_decay * decay, "rate": rate}
        for decay, params in found.items()
    ]


def ghost_groups(model: LanguageModel) -> list[dict[str, Any]]:
    """A group for each ghost, named by its layer and number."""
    return [
        {
            "name": ghost_group(number, ghost),
            "params": [p for p in layer.ghost_parameters(ghost) if p.requires_grad],
            "weight_decay": 0.0,
        }
        for number, layer in enumerate(model.routed_layers())
        for ghost in range(len(layer.ghosts))
    ]


def ghost_group(layer: int, ghost: int) -> str:
    """Name of the group of a ghost."""
    return f"ghost {layer}.{ghost}"


def build_optimizer(model: LanguageModel, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; AdamW runs fused, on the CPU too."""
    config = recipe.training.optimizer
    if isinstance(config, AdamWConfig):
        groups = parameter_groups(model, config.weight_decay, config.anchor_rate)
        return torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


def require_valid(ds_config: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for what DeepSpeed will not take under `zero_optimization`."""
    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ConfigError(f"{where}: {key}: {first['msg']}") from None


def build_engine(model: LanguageModel, recipe: Recipe, ds_config: dict[str, Any]) -> Any:
    """A `DeepSpeedEngine` around the model, at any ZeRO stage."""
    model.recompute = recipe.training.activation_checkpointing
    if recipe.training.compile:
        for block in model.blocks:
            block.compile()
    optimizer = build_optimizer(model, recipe)
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    except (AssertionError, NotImplementedError, ValueError, ZeroDivisionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"DeepSpeed refuses this configuration: {lines[0]}") from error
    for parameter in model.embedding.tied_parameters():  # type: ignore[operator]
        if hasattr(parameter, "ds_id"):  # ZeRO-3: the head reads the embedding's table
            deepspeed.zero.register_external_parameter(model.head, parameter)
    return engine


def set_learning_rate(engine: Any, value: float) -> None:
    """For every parameter group, times the group's own rate."""
    for group in engine.optimizer.param_groups:
        group["lr"] = value * group.get("rate", 1.0)


@torch.no_grad()
def write_parameter(parameter: nn.Parameter, value: Tensor) -> None:
    """Change a weight from outside the optimizer, at any stage and precision: the value alone would be
    undone by its float32 master copy at the next step. Collective; every process gives the same value."""
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
    if not hasattr(parameter, "ds_id"):
        safe_set_full_fp32_param(parameter, value)
        return
    share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    stop = share * (parameter.ds_zero_partition_rank + 1)  # type: ignore[attr-defined]
    padded = pad(value.flatten(), (0, stop - value.numel()))  # the last shares may be padding
    safe_set_local_fp32_param(parameter, padded[-share:])


def set_group_learning_rate(engine: Any, name: str, value: float) -> None:
    """For the parameter group of this name."""
    for group in engine.optimizer.param_groups:
        if group.get("name") == name:
            group["lr"] = value


def ghost_learning_rates(engine: Any) -> dict[str, float]:
    """By the name of the ghost's group; none without ghosts."""
    groups = engine.optimizer.param_groups
    return {g["name"]: g["lr"] for g in groups if g.get("name", "").startswith("ghost")}


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
    """Within it these are whole on every process, to be read; at any stage. Collective."""
    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters))
    return context


@torch.no_grad()
def read_parameter(parameter: nn.Parameter) -> Tensor:
    """A copy of a whole weight in float32, at any stage: its master where there is one. Collective."""
    master = safe_get_full_fp32_param(parameter)
    value = parameter if master is None else master
    return value.detach().float().clone()


def plain_gradient_norm(engine: Any) -> float | None:
    """Norm of the gradients before they are clipped, where DeepSpeed will not tell it (stage 0); None
    elsewhere."""
    if engine.zero_optimization():
        return None
    given = [p for p in engine.module.parameters() if p.grad is not None]
    shared, experts = split_params_into_shared_and_expert_params(given)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in part]) for part in (shared, experts)]
    squares = torch.stack([widened(norm).square() for norm in norms])
    for layer in engine.module.routed_layers()[:1]:
        if layer.backend.placement.size > 1:  # the other experts' part
            dist.all_reduce(squares[1:], group=layer.backend.ep_group)
    return float(squares.sum().sqrt())
