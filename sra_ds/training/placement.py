"""Which backend runs the experts and which of them live here; what is known to go wrong is refused."""

from typing import Any

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.moe.placement import WHOLE, Placement
from sra_ds.training.ds_config import zero_stage

EP = "parallel.expert_parallel_size"
BACKEND = "model.channel.backend"


def choose_placement(
    recipe: Recipe, ds_config: dict[str, Any], where: str, world_size: int, rank: int
) -> Placement:
    """The placement a recipe and a DeepSpeed configuration ask for; raises `ConfigError` with the reason
    for one that is impossible or would train wrongly. `where` names the configuration."""
    channel, size = recipe.model.channel, recipe.parallel.expert_parallel_size
    if not isinstance(channel, MoEChannelConfig):
        if size > 1:
            raise ConfigError(f"{EP}={size} needs model.channel.kind=moe")
        return WHOLE
    if size > 1:
        _check_sizes(recipe, channel, world_size)
        _check_zero(recipe, ds_config, where)
    assert channel.backend != "auto"
    return Placement(channel.backend, size, rank % size)


def _check_sizes(recipe: Recipe, channel: MoEChannelConfig, world_size: int) -> None:
    size = recipe.parallel.expert_parallel_size
    if channel.backend != "deepspeed":
        raise ConfigError(
            f"{EP}={size} needs {BACKEND}=deepspeed; {channel.backend} holds all experts on each process"
        )
    if world_size % size:
        raise ConfigError(f"{EP}={size} does not divide the {world_size} process(es)")
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
