"""Which backend runs the experts and which of them live here; what is known to go wrong is refused."""

from typing import Any

import torch

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.moe.placement import WHOLE, Placement
from sra_ds.training.ds_config import zero_stage

EP = "parallel.expert_parallel_size"
BACKEND = "model.channel.backend"


def choose_placement(
    recipe: Recipe, ds_config: dict[str, Any], where: str, world_size: int, rank: int
) -> Placement | None:
    """The placement a recipe and a DeepSpeed configuration ask for; None for `auto`, which is settled
    once all processes are there.

    Raises `ConfigError` with the reason for one that is impossible or would train wrongly. `where` names
    the configuration.
    """
    channel, size = recipe.model.channel, recipe.parallel.expert_parallel_size
    if not isinstance(channel, MoEChannelConfig):
        if size > 1:
            raise ConfigError(f"{EP}={size} needs model.channel.kind=moe")
        return WHOLE
    if size > 1:
        _check_sizes(recipe, channel, world_size)
        _check_zero(recipe, ds_config, where)
        return Placement("deepspeed", size, rank % size)
    return None if channel.backend == "auto" else Placement(channel.backend)


def require_backend(placement: Placement | None, device: torch.device) -> None:
    """Raise `BackendUnavailable` for a backend that is not installed or cannot run on this device."""
    if placement is not None and placement.backend == "megablocks":
        from sra_ds.moe.backends.megablocks import load_library, require_device

        require_device(device, load_library().interpreted)


def _check_sizes(recipe: Recipe, channel: MoEChannelConfig, world_size: int) -> None:
    size = recipe.parallel.expert_parallel_size
    if channel.backend not in ("deepspeed", "auto"):
        raise ConfigError(f"{EP}={size} needs {BACKEND}=deepspeed, not {channel.backend}")
    if world_size % size:
        raise ConfigError(
            f"{EP}={size} does not divide the {world_size} process(es); start {size}, or add {EP}=1"
        )
    if channel.experts % size:
        raise ConfigError(f"{EP}={size} does not divide model.channel.experts={channel.experts}")


def _check_zero(recipe: Recipe, ds_config: dict[str, Any], where: str) -> None:
    """Combinations that DeepSpeed 0.19.8 accepts and gets wrong, or refuses late."""
    zero = ds_config.get("zero_optimization", {})
    if zero_stage(ds_config) == 0 and recipe.training.gradient_clipping > 0:
        raise ConfigError(
            f"{where}: ZeRO stage 0 with {EP} > 1 clips by the norm of each process's own experts; use "
            "ds_configs/zero1.json, or training.gradient_clipping=0"
        )
    if ds_config.get("use_data_before_expert_parallelism"):
        raise ConfigError(
            f"{where}: use_data_before_expert_parallelism orders processes otherwise than {EP} does; "
            "leave it out"
        )
    if zero.get("zero_hpz_partition_size", 1) > 1 or zero.get("zero_quantized_gradients"):
        raise ConfigError(
            f"{where}: zero_hpz_partition_size and zero_quantized_gradients know no expert groups; leave "
            f"them out or use {EP}=1"
        )
