"""One recipe with every backend of the experts that is installed here, and its dense twin."""

import statistics
from typing import Any

import torch

from sra_ds.benchmarks.step import Step, engine_step, steps_in_turn
from sra_ds.config import Recipe
from sra_ds.data.loader import random_batch
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import BackendName, Placement
from sra_ds.timing import ratio
from sra_ds.training.backend_choice import installed_backends
from sra_ds.training.ds_config import choose_precision, zero_stage
from sra_ds.training.environment import choose_device, has_bf16, peak_flops
from sra_ds.training.processes import start_processes


def bench_backends(
    recipe: Recipe, dense: Recipe, ds_config: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """Through DeepSpeed at the precision of this device: median step time, tokens/s, MFU on active FLOPs,
    and on a GPU the peak memory of a step."""
    start_processes()
    device, name = choose_device()
    dtype, _ = choose_precision("auto", zero_stage(ds_config), has_bf16(device))
    peak, source = peak_flops(device, dtype)
    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}
    backends: list[BackendName | None] = [*installed_backends(device), None]
    for backend in backends:
        own = dense if backend is None else recipe
        row = f"{own.name}/{backend or 'dense'}"
        model = build_model(own, placement=Placement(backend or "local"))
        before = _start_measuring(device)
        steps[row] = engine_step(own, model, ds_config, dtype)
        steps[row](random_batch(own, own.training.batch_size, 0).to(device))
        memory[row] = _measured_peak(device) - before
    times = steps_in_turn(steps, recipe, device, rounds)
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    flops = {own.name: _flops(own) for own in (recipe, dense)}
    rows = {}
    for row, own_times in times.items():
        milliseconds = statistics.median(own_times)
        speed = 1e3 * tokens / milliseconds
        rows[row] = {
            "milliseconds": milliseconds,
            "tokens_per_second": speed,
            "mfu": speed * flops[row.split("/")[0]] / peak,
            "over_dense": ratio(times, row, f"{dense.name}/dense"),
            "peak_memory_bytes": memory[row],
        }
    facts = {"device": f"{device} ({name})", "dtype": str(dtype), "peak_flops": peak}
    return {**facts, "peak_flops_from": source, "tokens_per_step": tokens, "variants": rows}


def _flops(recipe: Recipe) -> float:
    return flops_per_token(build_model(recipe, "meta"), recipe.data.sequence_length)


def _start_measuring(device: torch.device) -> int:
    """Bytes in use on a GPU now, whose peak starts again; 0 on the CPU, whose peak never falls."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _measured_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
