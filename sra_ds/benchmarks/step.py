"""Training steps of whole recipes, in plain torch and by DeepSpeed, in turn in one process on random
tokens, fresh ones every round.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.timing import Times, in_turn, medians, ratio
from sra_ds.training.ds_config import merge_ds_config, plan_batches
from sra_ds.training.engine import build_engine, build_optimizer
from sra_ds.training.environment import choose_device
from sra_ds.training.processes import start_processes
from sra_ds.training.step import step_loss

Step = Callable[[Batch], None]


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
    """The same step through DeepSpeed, by all processes. Collective."""
    plan = plan_batches(recipe, dist.get_world_size())
    merged = merge_ds_config(ds_config, recipe, plan, dtype, "bench")
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
    steps: dict[str, Step] = {}
    for recipe in recipes:
        steps[f"{recipe.name}/torch"] = plain_step(recipe, build_model(recipe).to(device))
    for name, ds_config in ds_configs.items():
        steps[f"{recipes[0].name}/{name}"] = engine_step(
            recipes[0], build_model(recipes[0]), ds_config
        )
    times = steps_in_turn(steps, recipes[0], device, rounds)
    plain, last = f"{recipes[0].name}/torch", f"{recipes[-1].name}/torch"
    return {
        "milliseconds": medians(times),
        "all_milliseconds": times,
        "moe_over_dense": ratio(times, plain, last),
        "engine_over_plain": {
            name: ratio(times, f"{recipes[0].name}/{name}", plain) for name in ds_configs
        },
        "tokens_per_step": recipes[0].training.batch_size * recipes[0].data.sequence_length,
        "threads": torch.get_num_threads(),
    }


def steps_in_turn(
    steps: dict[str, Step], recipe: Recipe, device: torch.device, rounds: int
) -> Times:
    """One step of each variant a round, all on the same batch."""
    batch: Batch

    def renew(number: int) -> None:
        nonlocal batch
        batch = random_batch(recipe, recipe.training.batch_size, number).to(device)

    works = {name: lambda step=step: step(batch) for name, step in steps.items()}
    return in_turn(works, rounds, renew=renew)
