"""Weak scaling on this machine: processes of one thread with the same batch each, one against two."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from sra_ds.benchmarks.step import engine_step
from sra_ds.config import Recipe
from sra_ds.data.loader import random_batch
from sra_ds.model.language_model import build_model
from sra_ds.timing import WARM_UP
from sra_ds.training.environment import (
    be_local_rank,
    choose_device,
    free_port,
    leave,
    prepare_process,
)
from sra_ds.training.processes import finish_processes, start_processes

STEPS = 8


def bench_scaling(recipe: Recipe, ds_config: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Median tokens per second of one process and of two, in turn, and the median ratio of a round; each
    process has the recipe's batch."""
    windows = recipe.training.batch_size
    tokens = windows * recipe.data.sequence_length
    speeds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for world in speeds:
            with tempfile.TemporaryDirectory() as name:
                arguments = (world, free_port(), recipe, ds_config, windows, Path(name))
                spawn(_process, arguments, nprocs=world)
                seconds = json.loads((Path(name) / "seconds.json").read_text("utf-8"))
            speeds[world].append(world * tokens / seconds)
    ratios = [two / one for one, two in zip(speeds[1], speeds[2], strict=True)]
    return {
        "recipe": recipe.name,
        "windows_per_process": windows,
        "tokens_per_second": {str(n): statistics.median(found) for n, found in speeds.items()},
        "two_over_one": statistics.median(ratios),
        "all_ratios": ratios,
    }


def _process(
    rank: int,
    world: int,
    port: int,
    recipe: Recipe,
    ds_config: dict[str, Any],
    windows: int,
    folder: Path,
) -> None:
    be_local_rank(rank, world, port)
    prepare_process()
    torch.set_num_threads(1)
    start_processes()
    training = recipe.training.model_copy(update={"batch_size": windows * world})
    recipe = recipe.model_copy(update={"training": training})
    device, _ = choose_device()
    step = engine_step(recipe, build_model(recipe), ds_config)
    times = []
    for number in range(STEPS + WARM_UP):
        batch = random_batch(recipe, windows, number * world + rank).to(device)
        dist.barrier()
        start = time.perf_counter()
        step(batch)
        dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        median = statistics.median(times[WARM_UP:])
        (folder / "seconds.json").write_text(json.dumps(median), "utf-8")
    finish_processes()
    leave()
