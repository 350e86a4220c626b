"""Every layout against plain torch in one process: losses, updates, and going on from a checkpoint.

    case: ZeRO stage x (backend, expert parallelism) x activation checkpointing x routing kernel

A case trains three steps of SGD with momentum (Adam hides gradients of the wrong size) on its share of
the batch and compares losses and whole weights with the same steps of plain torch on the whole batch. It
saves, takes a fourth step in which the bytes sent are counted and compared with those planned, and takes
it and a fifth from the checkpoint of the case before it, which another layout wrote. The fifth step's
loss shows whether the optimizer's state arrived.
"""

import gc
import itertools
import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from sra_ds.config import Recipe, load_recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.inference.load import load_weights_into
from sra_ds.model.language_model import build_model
from sra_ds.moe.placement import BackendName, Placement
from sra_ds.ops.extension import extension, use_kernels
from sra_ds.planning import case as planning
from sra_ds.planning.shapes import Layout, read_shapes
from sra_ds.planning.zero import read_zero
from sra_ds.selftest.collectives import CollectiveCounter, Sent, as_planned, together
from sra_ds.storage import checkpoint
from sra_ds.training.ds_config import merge_ds_config, plan_batches
from sra_ds.training.engine import build_engine, build_optimizer
from sra_ds.training.engine_state import EngineState, engine_state, restore_engine
from sra_ds.training.environment import (
    be_local_rank,
    choose_device,
    free_port,
    leave,
    prepare_process,
)
from sra_ds.training.processes import finish_processes, start_processes
from sra_ds.training.step import step_loss

STEPS, RESUMED = 3, 2
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-3
RECIPE = (
    "data.sequence_length=32", "data.tokenizer.vocab_size=512", "model.width=32", "model.layers=2",
    "model.mixer.heads=2", "model.channel.experts=8", "model.channel.expert.hidden=32",
    "model.channel.router.initial_temperature=3", "losses.dispersion={kind: squared, weight: 0.1}",
    "training.batch_size=8", "training.precision=fp32", "training.optimizer=sgd",
    "training.optimizer.learning_rate=0.02", "training.optimizer.momentum=0.9",
    "training.gradient_clipping=0",
)  # fmt: skip


class Case(NamedTuple):
    """One layout; `expert_parallel` processes share one set of experts."""

    zero: int
    backend: BackendName
    expert_parallel: int
    recompute: bool
    kernel: str


class Reference(NamedTuple):
    """Plain torch: the loss of every step, initial weights and those after `STEPS`."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def cases(world: int) -> list[Case]:
    """All combinations that `world` processes allow with the backends and kernels installed here."""
    places: list[tuple[BackendName, int]] = [("local", 1)]
    if find_spec("megablocks") and torch.cuda.is_available():
        places.append(("megablocks", 1))
    places += [("deepspeed", size) for size in (1, 2, 4) if world % size == 0]
    device, _ = choose_device()
    kernels = ["reference", "compiled"] if device.type in extension().devices else ["reference"]
    combinations = itertools.product(places, (0, 1, 2, 3), (False, True), kernels)
    return [
        Case(zero, *place, recompute, kernel) for place, zero, recompute, kernel in combinations
    ]


def compare_layouts(world: int, folder: Path) -> list[dict[str, Any]]:
    """Run every case on `world` processes of this machine; one row of findings each."""
    spawn(_process, (world, free_port(), folder), nprocs=world)
    rows: list[dict[str, Any]] = json.loads((folder / "layouts.json").read_text("utf-8"))
    return rows


def _process(rank: int, world: int, port: int, folder: Path) -> None:
    be_local_rank(rank, world, port)
    prepare_process()
    start_processes()
    with use_kernels("reference"):
        reference = _plain_torch(_recipe(False))
    rows, before = [], None
    for case in tqdm(cases(world), f"{world} process(es)", disable=rank > 0):
        after = folder / "-".join(map(str, case))
        with use_kernels(case.kernel):
            row = _run_case(case, reference, after, before or after)
        rows.append({**case._asdict(), **row})
        if before is not None and rank == 0:
            shutil.rmtree(before)
        before = after
    if rank == 0:
        (folder / "layouts.json").write_text(json.dumps(rows), "utf-8")
    finish_processes()
    leave()


def _run_case(case: Case, reference: Reference, after: Path, before: Path) -> dict[str, Any]:
    """Largest differences over all processes and whether the case passed. Collective."""
    engine = _engine(case)
    losses = [_step(engine, step) for step in range(STEPS)]
    state = engine_state(engine)
    updates = _update_errors(state, reference)
    layout = checkpoint.Layout(dist.get_world_size(), case.zero, case.expert_parallel)
    tensors = {checkpoint.WEIGHTS: state.weights, checkpoint.OPTIMIZER: state.optimizer}
    checkpoint.save_checkpoint(after, checkpoint.Contents(tensors, {}, {}), layout)
    with CollectiveCounter() as counter:
        _forward_backward_update(engine, STEPS)
    sent = _sent_by_all(counter)
    _discard(engine)
    engine = _engine(case, before)
    after_checkpoint = [_step(engine, step) for step in range(STEPS, STEPS + RESUMED)]
    _discard(engine)
    pairs = zip(after_checkpoint, reference.losses[STEPS:], strict=True)
    resumed = max(abs(a - b) for a, b in pairs)
    wrong = max(abs(a - b) for a, b in zip(losses, reference.losses, strict=False))
    found = {
        "loss_difference": wrong,
        "update_difference": max(updates.values()),
        "worst_parameter": max(updates, key=lambda name: updates[name]),
        "resumed_loss_difference": resumed,
        "bytes_sent": sum(sent.values()),
        "bytes_as_planned": as_planned(sent, _planned(case)),
    }
    same = max(wrong, resumed) < LOSS_TOLERANCE and max(updates.values()) < UPDATE_TOLERANCE
    return {**found, "passed": same and found["bytes_as_planned"]}


def _recipe(recompute: bool) -> Recipe:
    checkpointing = f"training.activation_checkpointing={str(recompute).lower()}"
    return load_recipe("quickstart", [*RECIPE, checkpointing])


def _plain_torch(recipe: Recipe) -> Reference:
    """The definition: the whole batch, no DeepSpeed, the same on every process."""
    device, _ = choose_device()
    model = build_model(recipe).to(device)
    optimizer = build_optimizer(model, recipe)
    before = {n: p.detach().flatten().cpu().clone() for n, p in model.named_parameters()}
    losses, after = [], before
    for step in range(STEPS + RESUMED):
        batch = random_batch(recipe, recipe.training.batch_size, step).to(device)
        loss = step_loss(model(*batch), recipe.losses).total
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        if step < STEPS:
            after = {n: p.detach().flatten().cpu().clone() for n, p in model.named_parameters()}
    return Reference(losses, before, after)


def _engine(case: Case, checkpointed: Path | None = None) -> Any:
    """A new engine in the layout of a case, from a checkpoint if one is given."""
    recipe, world = _recipe(case.recompute), dist.get_world_size()
    size = case.expert_parallel
    model = build_model(recipe, placement=Placement(case.backend, size, dist.get_rank() % size))
    if checkpointed is not None:
        load_weights_into(model, checkpointed)
    plan = plan_batches(recipe, world)
    merged = merge_ds_config(_ds_config(case), recipe, plan, torch.float32, "selftest")
    engine = build_engine(model, recipe, merged)
    if checkpointed is not None:
        weights = checkpoint.open_tensors(checkpointed, checkpoint.WEIGHTS)
        optimizer = checkpoint.open_tensors(checkpointed, checkpoint.OPTIMIZER)
        restore_engine(engine, weights, optimizer)
    return engine


def _ds_config(case: Case) -> dict[str, Any]:
    return {"zero_optimization": {"stage": case.zero, "stage3_param_persistence_threshold": 100}}


def _planned(case: Case) -> planning.Case:
    """A case as planning takes it."""
    recipe, world = _recipe(case.recompute), dist.get_world_size()
    layout = Layout(world, case.expert_parallel, marked=case.backend == "deepspeed")
    windows = plan_batches(recipe, world).micro_batch_size
    zero = read_zero(_ds_config(case))
    return planning.Case(recipe, read_shapes(recipe), layout, zero, windows, width=4)


def _sent_by_all(counter: CollectiveCounter) -> Sent:
    """Collective."""
    gathered: list[Sent] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(counter.bytes))
    return together(gathered)


def _step(engine: Any, step: int) -> float:
    """One optimizer step; the mean loss of all processes. Collective."""
    mean = _forward_backward_update(engine, step).detach().double()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def _forward_backward_update(engine: Any, step: int) -> Tensor:
    """An optimizer step on this process's part of the batch; its loss. Collective."""
    recipe = _recipe(False)
    plan = plan_batches(recipe, dist.get_world_size())
    whole = random_batch(recipe, recipe.training.batch_size, step)
    part = plan.rank_slice(0, dist.get_rank())
    batch = Batch(whole.ids_BT[part], whole.targets_BT[part], whole.document_ids_BT[part])
    loss = step_loss(engine(*batch.to(engine.device)), recipe.losses).total
    engine.backward(loss)
    engine.step()
    return loss


def _update_errors(state: EngineState, reference: Reference) -> dict[str, float]:
    """By parameter: the largest difference of its change from plain torch's, over the largest change.
    Infinite for one that did not move or that no process holds. Collective."""
    errors: dict[str, float] = {}
    for name, expected in _held(state, reference.after):
        values = state.weights[name].values
        scale = float((reference.after[name] - reference.before[name]).abs().max())
        wrong = float((values.detach().cpu() - expected).abs().max())
        errors[name] = wrong / scale if scale > 0 else float("inf")
    gathered: list[dict[str, float]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, errors)
    return {
        name: max((held[name] for held in gathered if name in held), default=float("inf"))
        for name in reference.after
    }


def _held(state: EngineState, whole: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and reference values of each fragment of a parameter this process holds."""
    for name, (part, _) in state.weights.items():
        if name in whole:
            yield name, whole[name][part.start : part.stop]


def _discard(engine: Any) -> None:
    engine.destroy()
    gc.collect()
