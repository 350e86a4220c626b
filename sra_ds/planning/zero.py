"""What of a DeepSpeed 0.19.8 configuration decides memory and communication, with its defaults."""

from typing import Any, NamedTuple

from sra_ds.errors import ConfigError

UNPLANNED = {
    "reduce_scatter": True,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
}
"""Options and the value the closed forms assume; they do not describe others."""


class Zero(NamedTuple):
    """Sizes are in elements, as in the JSON."""

    stage: int = 0
    reduce_bucket: int = 500_000_000
    """Elements of gradients that are reduced at a time."""
    reduce_to_all: bool = True
    """ZeRO-1/2 all-reduces every bucket (`use_multi_rank_bucket_allreduce`) instead of reducing each part
    of it to the process that owns it."""
    overlap: bool = False
    """Two gradient buckets instead of one: one is filled while the other is reduced."""
    persistence: int = 100_000
    """ZeRO-3 keeps parameters of at most so many elements whole between steps."""
    reuse_distance: int = 1_000_000_000
    """ZeRO-3 keeps a gathered parameter when fewer elements than this come before its next use."""
    prefetch: int = 50_000_000
    """Elements that ZeRO-3 gathers ahead of use."""
    sub_group: int = 1_000_000_000
    """Elements that ZeRO-3 updates at a time."""
    optimizer_on_host: bool = False
    parameters_on_host: bool = False

    @property
    def buckets(self) -> int:
        """Gradient buckets that exist."""
        return 2 if self.overlap and self.stage in (1, 2) else 1


def require_planned(ds_config: dict[str, Any], where: str) -> None:
    """Raise `ConfigError` for options that the closed forms do not describe."""
    zero = ds_config.get("zero_optimization", {})
    for key, known in UNPLANNED.items():
        if zero.get(key, known) != known:
            raise ConfigError(f"{where}: no plan for zero_optimization.{key}={zero[key]}")
    if "communication_data_type" in ds_config:
        raise ConfigError(f"{where}: no plan for communication_data_type")


def read_zero(ds_config: dict[str, Any]) -> Zero:
    """The part of a DeepSpeed configuration that plans depend on."""
    zero = ds_config.get("zero_optimization", {})
    stage, base = zero.get("stage", 0), Zero()
    return Zero(
        stage=stage,
        reduce_bucket=int(zero.get("reduce_bucket_size", base.reduce_bucket)),
        reduce_to_all=zero.get("use_multi_rank_bucket_allreduce", True),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        persistence=int(zero.get("stage3_param_persistence_threshold", base.persistence)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", base.reuse_distance)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", base.prefetch)),
        sub_group=int(zero.get("sub_group_size", base.sub_group)),
        optimizer_on_host=_on_host(zero, "offload_optimizer"),
        parameters_on_host=_on_host(zero, "offload_param"),
    )


def _on_host(zero: dict[str, Any], key: str) -> bool:
    device = (zero.get(key) or {}).get("device", "none")
    return bool(device != "none")
