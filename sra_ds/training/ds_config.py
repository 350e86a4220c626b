"""One owner per knob: the DeepSpeed JSON has ZeRO, offload and communication, the recipe the rest.

A key of the recipe may be absent or "auto" in the JSON; with another value than the recipe's it is a
`ConfigError` that names both places.
"""

import difflib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sra_ds.config import Recipe
from sra_ds.errors import ConfigError

RECIPE_ONLY = {
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
    "fp16": "training.precision (fp32 or bf16)",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "curriculum_learning": "data",
    "expert_parallel": "parallel.expert_parallel_size",
    "data_efficiency": "data",
    "activation_checkpointing": "training.activation_checkpointing",
}

OWNED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "bf16",
)  # fmt: skip
PASSED_ON = (
    "zero_optimization", "communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "disable_allgather", "use_data_before_expert_parallelism", "aio", "comms_logger", "flops_profiler",
    "wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "log_level",
    "tensorboard", "csv_monitor",
)  # fmt: skip
"""Keys DeepSpeed gets as they are. It ignores what it does not know, so all others are refused."""


class BatchPlan(NamedTuple):
    """batch_size = micro_batch_size * accumulation * world_size, in windows."""

    batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int

    def rank_slice(self, micro: int, rank: int) -> slice:
        """Which samples of a step this rank computes in micro-batch `micro`."""
        start = (micro * self.world_size + rank) * self.micro_batch_size
        return slice(start, start + self.micro_batch_size)


def plan_batches(recipe: Recipe, world_size: int) -> BatchPlan:
    """Split the step's windows over processes and micro-batches; raises `ConfigError` if they do not
    divide."""
    total = recipe.training.batch_size
    if total % world_size:
        near = -(-total // world_size) * world_size
        raise ConfigError(
            f"training.batch_size={total} is not divisible by the {world_size} processes; add "
            f"training.batch_size={near}"
        )
    micro = recipe.training.micro_batch_size or total // world_size
    if total % (micro * world_size):
        raise ConfigError(
            f"training.batch_size={total} is not divisible by training.micro_batch_size={micro} x "
            f"{world_size} processes"
        )
    return BatchPlan(total, micro, total // (micro * world_size), world_size)


def read_ds_config(path: Path) -> dict[str, Any]:
    """The JSON as a dictionary; raises `ConfigError` for anything else."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except OSError:
        raise ConfigError(f"--deepspeed {path}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"--deepspeed {path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path}: expected a JSON object")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(f"--deepspeed {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    return config


def zero_stage(ds_config: dict[str, Any]) -> int:
    """The ZeRO stage a DeepSpeed configuration asks for."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def choose_precision(asked: str, stage: int, has_bf16: bool) -> tuple[torch.dtype, str]:
    """Parameter dtype for `training.precision` at a ZeRO stage, and why."""
    if asked != "auto":
        return (torch.bfloat16 if asked == "bf16" else torch.float32), "training.precision"
    if not has_bf16:
        return torch.float32, "bf16 is slower than fp32 on this device"
    if stage == 0:
        return torch.float32, "ZeRO stage 0 keeps no float32 master weights for bf16"
    return torch.bfloat16, "the GPU has bf16"


def merge_ds_config(
    ds_config: dict[str, Any], recipe: Recipe, batches: BatchPlan, dtype: torch.dtype, where: str
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run."""
    _require_known(ds_config, where)
    owned = {
        "train_batch_size": (batches.batch_size, "training.batch_size"),
        "train_micro_batch_size_per_gpu": (batches.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (
            batches.accumulation,
            "training.batch_size / (micro_batch_size x processes)",
        ),
        "gradient_clipping": (recipe.training.gradient_clipping, "training.gradient_clipping"),
        "bf16": ({"enabled": dtype == torch.bfloat16}, "training.precision"),
    }
    merged = dict(ds_config)
    for key, (value, owner) in owned.items():
        given = ds_config.get(key, "auto")
        same = given == value or (
            isinstance(given, dict) and given.get("enabled") in ("auto", None)
        )
        if given != "auto" and not same:
            raise ConfigError(f"{where}: {key}={given} contradicts the recipe's {owner}={value}")
        merged[key] = value
    for part in ("offload_optimizer", "offload_param"):
        offload = ds_config.get("zero_optimization", {}).get(part)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise ConfigError(
                f"{where}: {part}.device=nvme keeps weights where checkpoints do not reach them; use cpu"
            )
    if dtype == torch.bfloat16 and zero_stage(ds_config) == 0:
        raise ConfigError(
            f"{where}: bf16 at ZeRO stage 0 has no float32 master weights and trains differently from "
            "stages 1-3; use ds_configs/zero1.json or training.precision=fp32"
        )
    return {
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        **merged,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _require_known(ds_config: dict[str, Any], where: str) -> None:
    for key in ds_config:
        if key in RECIPE_ONLY:
            raise ConfigError(
                f"{where}: {key!r} is set there; the recipe owns it ({RECIPE_ONLY[key]})"
            )
        if key not in (*OWNED, *PASSED_ON):
            near = difflib.get_close_matches(key, (*OWNED, *PASSED_ON), 1)
            hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
            raise ConfigError(f"{where}: {key!r} is not passed on to DeepSpeed{hint}")
