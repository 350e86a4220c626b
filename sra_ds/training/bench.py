"""Step times and memory, measured so that ratios can be trusted: every variant in one process, one step
each in turn, medians over the rounds. Random tokens, fresh ones every step.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch
from sra_ds.errors import TrainingError
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.moe.placement import BackendName, Placement
from sra_ds.training.backend_choice import installed_backends
from sra_ds.training.ds_config import merge_ds_config, plan_batches
from sra_ds.training.engine import build_engine, build_optimizer
from sra_ds.training.environment import choose_device, choose_precision, peak_flops
from sra_ds.training.processes import start_processes
from sra_ds.training.step import step_loss

Step = Callable[[Batch], None]


def random_batch(recipe: Recipe, windows: int, step: int) -> Batch:
    """Uniform random tokens, one document per window."""
    shape = (windows, recipe.data.sequence_length)
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(recipe.data.tokenizer.vocab_size, shape, generator=generator)
    return Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids))


def plain_step(recipe: Recipe, model: LanguageModel) -> Step:
    """A plain torch training step of the recipe: what the engine is compared with."""
    optimizer = build_optimizer(model, recipe)
    clip = recipe.training.gradient_clipping

    def step(batch: Batch) -> None:
        step_loss(model(*batch), recipe.losses).total.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def engine_step(
    recipe: Recipe,
    model: LanguageModel,
    ds_config: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Step:
    """The same step through DeepSpeed."""
    merged = merge_ds_config(ds_config, recipe, plan_batches(recipe, 1), dtype, "bench")
    engine = build_engine(model, recipe, merged)

    def step(batch: Batch) -> None:
        engine.backward(step_loss(engine(*batch), recipe.losses).total)
        engine.step()

    return step


def bench_step(
    recipes: list[Recipe], ds_configs: dict[str, dict[str, Any]], rounds: int
) -> dict[str, Any]:
    """Median step time of every recipe in plain torch, of the first with each DeepSpeed configuration
    (by name), and their ratios.

    `moe_over_dense` compares the first recipe with the last one named (the dense twin) in plain torch;
    `engine_over_plain` compares the configurations with plain torch for the first recipe.
    """
    start_processes()
    device, _ = choose_device()
    variants: dict[str, Step] = {}
    for recipe in recipes:
        variants[f"{recipe.name}/torch"] = plain_step(recipe, build_model(recipe).to(device))
    for name, ds_config in ds_configs.items():
        variants[f"{recipes[0].name}/{name}"] = engine_step(
            recipes[0], build_model(recipes[0]), ds_config
        )
    seconds = _in_turn(variants, recipes[0], device, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain, last = f"{recipes[0].name}/torch", f"{recipes[-1].name}/torch"
    return {
        "seconds": medians,
        "all_seconds": seconds,
        "moe_over_dense": _ratio(seconds, plain, last),
        "engine_over_plain": {
            name: _ratio(seconds, f"{recipes[0].name}/{name}", plain) for name in ds_configs
        },
        "tokens_per_step": recipes[0].training.batch_size * recipes[0].data.sequence_length,
        "threads": torch.get_num_threads(),
    }


def bench_backends(
    recipe: Recipe, dense: Recipe, ds_config: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """One recipe with every backend installed here, and its dense twin, through DeepSpeed at the
    precision of this device: median step time, tokens/s, MFU on active FLOPs, and on a GPU the peak
    memory of a step."""
    start_processes()
    device, name = choose_device()
    dtype, _ = choose_precision("auto", device)
    peak, source = peak_flops(device, dtype)
    variants: dict[str, Step] = {}
    memory: dict[str, int] = {}
    backends: list[BackendName | None] = [*installed_backends(device), None]
    for backend in backends:
        own = dense if backend is None else recipe
        label = f"{own.name}/{backend or 'dense'}"
        model = build_model(own, placement=Placement(backend or "local"))
        before = _start_measuring(device)
        variants[label] = engine_step(own, model, ds_config, dtype)
        variants[label](random_batch(own, own.training.batch_size, 0).to(device))
        memory[label] = _measured_peak(device) - before
    seconds = _in_turn(variants, recipe, device, rounds)
    tokens = recipe.training.batch_size * recipe.data.sequence_length
    flops = {own.name: _flops(own) for own in (recipe, dense)}
    twin = f"{dense.name}/dense"
    rows = {}
    for label, values in seconds.items():
        speed = tokens / statistics.median(values)
        rows[label] = {
            "milliseconds": 1e3 * statistics.median(values),
            "tokens_per_second": speed,
            "mfu": speed * flops[label.split("/")[0]] / peak,
            "over_dense": _ratio(seconds, label, twin),
            "peak_memory_bytes": memory[label],
        }
    facts = {"device": f"{device} ({name})", "dtype": str(dtype), "peak_flops": peak}
    return {**facts, "peak_flops_from": source, "tokens_per_step": tokens, "variants": rows}


def _flops(recipe: Recipe) -> float:
    return flops_per_token(build_model(recipe, "meta"), recipe.data.sequence_length)


def _in_turn(
    variants: dict[str, Step], recipe: Recipe, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each variant's steps, one step each a round, after two rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(rounds + 2), "rounds"):
        batch = random_batch(recipe, recipe.training.batch_size, number).to(device)
        for name, step in variants.items():
            start = time.perf_counter()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _start_measuring(device: torch.device) -> int:
    """Bytes in use on a GPU now, whose peak starts again; 0 on the CPU, whose peak never falls."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _measured_peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_memory_of_one_step(recipe: Recipe, ds_config: dict[str, Any] | None) -> dict[str, Any]:
    """Peak resident bytes of this process over one training step, and before the model was built.
    Call it in a fresh process: a peak never falls. `ds_config` None is plain torch. On the CPU."""
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


def _ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of the ratio within each round."""
    pairs = zip(seconds[above], seconds[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
