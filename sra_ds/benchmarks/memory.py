"""Peak memory of one training step, each in a process of its own: a peak never falls."""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from sra_ds.benchmarks.step import engine_step, plain_step
from sra_ds.config import Recipe
from sra_ds.data.loader import random_batch
from sra_ds.errors import TrainingError
from sra_ds.model.language_model import build_model
from sra_ds.training.processes import start_processes


def bench_memory(
    recipe: Recipe, ds_configs: dict[str, dict[str, Any] | None], one: str | None
) -> dict[str, Any]:
    """The peak with each DeepSpeed configuration by its name, None being plain torch. This program is
    called again for each, with `--json --one NAME`; `one` says that this is such a call."""
    if one is None:
        return in_fresh_processes(["--json", "--one"], list(ds_configs))
    return peak_memory_of_one_step(recipe, ds_configs[one])


def peak_memory_of_one_step(recipe: Recipe, ds_config: dict[str, Any] | None) -> dict[str, Any]:
    """Peak resident bytes of this process over one training step, and before the model was built.
    Call it in a fresh process. `ds_config` None is plain torch. On the CPU."""
    if ds_config is not None:
        start_processes()
    before = _peak_bytes()
    model = build_model(recipe)
    step = plain_step(recipe, model) if ds_config is None else engine_step(recipe, model, ds_config)
    step(random_batch(recipe, recipe.training.batch_size, 0))
    return {
        "recipe": recipe.name,
        "micro_batch_size": recipe.training.batch_size,
        "peak_bytes": _peak_bytes(),
        "peak_bytes_before_model": before,
    }


def in_fresh_processes(arguments: list[str], last: Sequence[str]) -> dict[str, Any]:
    """The JSON that this program prints, run again with more arguments and each `last` one in turn."""
    found = {}
    for one in last:
        command = [sys.executable, *sys.argv, *arguments, one]
        result = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if result.returncode:
            raise TrainingError(f"{' '.join(command[1:])} ended with exit code {result.returncode}")
        found[one] = json.loads(result.stdout)
    return found


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
