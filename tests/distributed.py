"""Several gloo processes on one machine, running a plain top-level function, and a small model for them.

The processes join and leave through the same calls as a run, on the CPU whatever the machine has. The
model is tame, so that rounding does not grow, and all its parts learn; buckets and groups are cut to its
size, so that it meets what a large one does.
"""

import importlib.util
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from commands import ROOT
from sra_ds.config import Recipe
from sra_ds.config.loading import merge, validate
from sra_ds.data.loader import Batch, random_batch
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.seeds import generator
from sra_ds.training.ds_config import merge_ds_config, plan_batches, read_ds_config
from sra_ds.training.engine import build_engine, plain_gradient_norm
from sra_ds.training.environment import be_local_rank, free_port, prepare_process
from sra_ds.training.placement import choose_placement
from sra_ds.training.processes import finish_processes, start_processes
from sra_ds.training.step import step_loss

ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
"""What DeepSpeed and torch read when they are imported."""
GELU = {"kind": "gelu", "hidden": 16, "dropout": 0.0}
RECIPE: dict[str, Any] = {
    "name": "distributed",
    "data": {"source": "docstrings", "sequence_length": 16, "tokenizer": {"vocab_size": 257}},
    "model": {
        "width": 32,
        "layers": 2,
        "embedding": {"kind": "token", "dropout": 0.0},
        "mixer": {"kind": "attention", "heads": 2, "dropout": 0.0},
        "channel": {
            "kind": "moe",
            "experts": 8,
            "expert": GELU,
            "router": {"kind": "cosine", "initial_temperature": 3.0},
            "backend": "deepspeed",
        },
        "head": {"kind": "tied", "chunk_tokens": 13},
    },
    "losses": {
        "balance": {"kind": "cv2", "weight": 0.05},
        "dispersion": {"kind": "squared", "weight": 0.05},
        "z_weight": 0.001,
    },
    "training": {
        "steps": 20,
        "batch_size": 8,
        "gradient_clipping": 0.0,
        "optimizer": {"kind": "sgd", "learning_rate": 0.2},
    },
}
SMALL = {
    "reduce_bucket_size": 3000,
    "allgather_bucket_size": 3000,
    "stage3_prefetch_bucket_size": 3000,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 5000,
}


def recipe_of(ep: int = 1, overlay: dict[str, Any] | None = None) -> Recipe:
    """The small model with its experts spread over `ep` processes."""
    placed = merge(RECIPE, {"parallel": {"expert_parallel_size": ep}})
    return validate(merge(placed, overlay or {}))


def config_of(stage: int, shipped: str = "") -> dict[str, Any]:
    """The shipped DeepSpeed configuration of a stage for a small model; a named one as it is."""
    config = read_ds_config(ROOT / "ds_configs" / (shipped or f"zero{stage}.json"))
    if not shipped:
        config["zero_optimization"] |= SMALL
    return config


@torch.no_grad()
def enlarge(model: LanguageModel) -> None:
    """Weights under which all parts learn; an expert's are its own, whoever holds it."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "anchors" not in name:
            parameter.mul_(25 if name.startswith("embedding") else 10)
    for number, layer in enumerate(model.routed_layers()):
        experts = layer.backend.experts
        for name, parameter in experts.named_parameters():
            for row, expert in enumerate(experts.expert_ids):
                parameter[row].normal_(0, 0.4, generator=generator(0, number, name, expert))


def run_ranks(world: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`body(*arguments)` on `world` connected processes; what each returned, by rank."""
    port = free_port()
    where = (inspect.getfile(body), body.__name__)  # pytest's names of modules mean nothing there
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, ON_CPU):
        mp.spawn(_rank, (world, port, folder, where, arguments), nprocs=world, join=True)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _rank(
    rank: int, world: int, port: int, folder: str, where: tuple[str, str], arguments: tuple
) -> None:
    be_local_rank(rank, world, port)
    torch.set_num_threads(1)
    prepare_process()
    start_processes()
    torch.save(_load(*where)(*arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    finish_processes()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still free tensors, and abort an interpreter that closes


def _load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location("body", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    body: Callable[..., Any] = getattr(module, name)
    return body


def open_engine(
    recipe: Recipe,
    ds_config: dict[str, Any],
    prepare: Callable[[LanguageModel], Any] = enlarge,
) -> Any:
    """The engine of this process for a recipe, its model changed by `prepare` first."""
    world, rank = dist.get_world_size(), dist.get_rank()
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    merged = merge_ds_config(ds_config, recipe, plan_batches(recipe, world), dtype, "test")
    model = build_model(recipe, placement=choose_placement(recipe, merged, "test", world, rank))
    prepare(model)
    return build_engine(model, recipe, merged)


def engine_step(engine: Any, recipe: Recipe, number: int) -> tuple[float, float]:
    """One optimizer step on random tokens: mean loss over all processes, norm of the gradient."""
    world, rank = dist.get_world_size(), dist.get_rank()
    batches = plan_batches(recipe, world)
    windows = random_batch(recipe, batches.batch_size, number)
    losses = []
    for micro in range(batches.accumulation):
        output = engine(*cut(windows, batches.rank_slice(micro, rank)))
        loss = step_loss(output, recipe.losses).total
        losses.append(loss.detach())
        engine.backward(loss)
        norm = plain_gradient_norm(engine)
        engine.step()
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return float(mean) / world, norm


def plain_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, recipe: Recipe, number: int, world: int
) -> tuple[float, float]:
    """The step of `world` processes, done by this one in plain torch."""
    batches = plan_batches(recipe, world)
    windows = random_batch(recipe, batches.batch_size, number)
    losses = []
    for part in torch.arange(batches.batch_size).chunk(batches.accumulation):
        loss = step_loss(model(*cut(windows, part)), recipe.losses).total / batches.accumulation
        losses.append(loss.detach())
        loss.backward()
    limit = recipe.training.gradient_clipping or torch.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    optimizer.zero_grad()
    return float(sum(losses)), float(norm)


def cut(windows: Batch, part: slice | Tensor) -> Batch:
    """Some windows of a batch."""
    return Batch(*(None if t is None else t[part] for t in windows))


@torch.no_grad()
def held_weights(engine: Any) -> dict[str, Tensor]:
    """Every weight the model computes with, whole, but of the experts those held here."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    return weights
