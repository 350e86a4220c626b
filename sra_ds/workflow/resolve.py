"""From a recipe and a DeepSpeed JSON to facts about this machine, and the dry run that shows them."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sra_ds.config import Recipe
from sra_ds.data.prepare import corpus_folder
from sra_ds.data.shards import TokenCorpus
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import Placement
from sra_ds.ops.extension import extension
from sra_ds.planning.case import Case
from sra_ds.planning.memory import estimate
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import read_zero
from sra_ds.storage.run_dir import RunDir
from sra_ds.training import environment
from sra_ds.training.ds_config import (
    BatchPlan,
    choose_precision,
    merge_ds_config,
    plan_batches,
    read_ds_config,
    zero_stage,
)
from sra_ds.training.engine import require_valid
from sra_ds.training.logging import require_wandb
from sra_ds.training.placement import choose_placement, require_backend

BYTES_PER_WEIGHT, BYTES_PER_STATE = 4, 8


class Resolved(NamedTuple):
    """What a run will use; `reasons` say why device and precision were chosen."""

    recipe: Recipe
    ds_config: dict[str, Any]
    batches: BatchPlan
    device: torch.device
    dtype: torch.dtype
    placement: Placement | None
    """None while `backend: auto` waits for the processes."""
    reasons: dict[str, str]


def resolve(recipe: Recipe, ds_path: Path) -> Resolved:
    """Settle device, precision, batch arithmetic and the DeepSpeed configuration, or say what does not
    fit together (`ConfigError`)."""
    require_wandb(recipe)
    device, device_reason = environment.choose_device()
    asked = read_ds_config(ds_path)
    dtype, dtype_reason = choose_precision(
        recipe.training.precision, zero_stage(asked), environment.has_bf16(device)
    )
    batches = plan_batches(recipe, environment.world_size())
    ds_config = merge_ds_config(asked, recipe, batches, dtype, str(ds_path))
    require_valid(ds_config, str(ds_path))
    world_size, rank = environment.world_size(), environment.rank()
    placement = choose_placement(recipe, ds_config, str(ds_path), world_size, rank)
    require_backend(placement, device)
    reasons = {"device": device_reason, "precision": dtype_reason, "kernels": extension().reason}
    return Resolved(recipe, ds_config, batches, device, dtype, placement, reasons)


def dry_run(resolved: Resolved, run: RunDir) -> dict[str, Any]:
    """Everything that can be known before training: parameters, data, batches, memory, disk."""
    recipe, batches = resolved.recipe, resolved.batches
    counts = count_parameters(build_model(recipe, "meta"))
    stage = zero_stage(resolved.ds_config)
    steps = recipe.training.steps
    return {
        "recipe": recipe.name,
        "run": str(run.path),
        "device": f"{resolved.device} ({resolved.reasons['device']})",
        "precision": f"{resolved.dtype} ({resolved.reasons['precision']})",
        "routing_kernels": resolved.reasons["kernels"],
        "zero_stage": stage,
        "batches": batches._asdict(),
        "routing_statistics_over_windows": batches.micro_batch_size * batches.world_size,
        "tokens": steps * batches.batch_size * recipe.data.sequence_length,
        "parameters": {key: counts[key] for key in ("total", "active", "active_with_anchors")},
        "memory_bytes_per_process": _memory(resolved),
        "disk_bytes": _disk(recipe, counts["total"], run),
        "data": _data(recipe),
    }


def _memory(resolved: Resolved) -> dict[str, Any]:
    """Bytes by what they hold, each at its own largest, and the peak of each moment of a step; `total` is
    the largest of those."""
    recipe, batches, placement = resolved.recipe, resolved.batches, resolved.placement
    marked = placement is not None and placement.backend == "deepspeed"
    layout = Layout(batches.world_size, recipe.parallel.expert_parallel_size, marked)
    case = Case(
        recipe, read_shapes(recipe), layout, read_zero(resolved.ds_config),
        batches.micro_batch_size, batches.accumulation,
        resolved.dtype.itemsize, resolved.device.type, resolved.device.type in extension().devices,
    )  # fmt: skip
    memory = estimate(case)
    return {**memory._asdict(), "total": memory.peak}


def _disk(recipe: Recipe, parameters: int, run: RunDir) -> dict[str, Any]:
    existing = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    whole = parameters * (BYTES_PER_WEIGHT + BYTES_PER_STATE)
    needed = whole * (recipe.checkpoint.keep + 1) + parameters * BYTES_PER_WEIGHT * 2
    free = shutil.disk_usage(existing).free
    return {"per_checkpoint": whole, "needed": needed, "free": free, "enough": free > needed}


def _data(recipe: Recipe) -> dict[str, Any]:
    folder = corpus_folder(recipe.data)
    if not folder.is_dir():
        return {"folder": str(folder), "prepared": False}
    corpus = TokenCorpus(folder)
    return {
        "folder": str(folder),
        "prepared": True,
        "fingerprint": corpus.fingerprint,
        "train_tokens": corpus.split("train").tokens,
    }
