"""The parts of the Semantic Resonance LM at every ZeRO stage on two processes, against plain torch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed import (
    config_of,
    engine_step,
    enlarge,
    open_engine,
    plain_step,
    recipe_of,
    run_ranks,
)
from families import FAMILIES
from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.model.language_model import build_model
from sra_ds.training.controllers import build_controllers
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.engine import build_optimizer
from sra_ds.training.processes import mean_over_ranks

NAMES = ("resonance", "resonance-moe", "resonance-blocks")
STAGES, STEPS = (0, 1, 2, 3), 4


def recipe(name: str) -> Recipe:
    """Untrained weights go through unscaled: sharp thresholds would part company by rounding."""
    training = {"optimizer": {"kind": "sgd", "learning_rate": 0.1}}
    losses = {"balance": "none", "dispersion": "none", "z_weight": 0.0}
    if FAMILIES[name]["mixer"].get("halting") != "hard":
        losses["ponder_weight"] = 0.05
    overlay = {"model": FAMILIES[name], "training": training, "losses": losses}
    return recipe_of(overlay=overlay)


def settled(model: torch.nn.Module) -> None:
    """As `enlarge`, and no threshold that rounding could cross."""
    enlarge(model)  # type: ignore[arg-type]
    for block in model.blocks:  # type: ignore[union-attr]
        block.mixer.threshold = 0.0 if block.mixer.halting == "hard" else 0.5


def train_apart() -> list[float]:
    """Losses at each stage where every token of the first process stops at once, none of the other."""
    own, losses = recipe("resonance-moe"), []
    for stage in STAGES:
        engine = open_engine(own, config_of(stage), settled)
        for block in engine.module.blocks:
            block.mixer.threshold = 0.0 if dist.get_rank() else 2.0
        losses += [engine_step(engine, own, number)[0] for number in range(2)]
    return losses


def train_everywhere() -> dict[str, list[float]]:
    """Losses of each family at each stage, and how far documents' starts have moved."""
    found = {}
    for name in NAMES:
        for stage in STAGES:
            own = recipe(name)
            engine = open_engine(own, config_of(stage), settled)
            controllers = build_controllers(own, engine.module)
            losses = []
            for number in range(STEPS):
                losses.append(engine_step(engine, own, number)[0])
                write(controllers, engine, random_batch(own, 8, number))
            found[f"{name}-{stage}"] = [*losses, *moved(engine.module)]
    return found


def write(controllers: dict[str, Any], model: Any, batch: Batch) -> None:
    """What the trainer does after a step, from this process's half of the windows."""
    if "memory" not in controllers:
        return
    several = dist.is_initialized()
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4) if several else slice(None)
    with torch.no_grad():
        states = model(*(None if t is None else t[part] for t in batch)).memory_states_HCC
    states = [mean_over_ranks(state) for state in states] if several else states
    controllers["memory"].on_step_end(0, Seen(memory_states_HCC=states))


def moved(model: Any) -> list[float]:
    return [float(memory.start_state_HCC.norm()) for memory in model.persistent_memories()]


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[float]]]:
    return run_ranks(2, train_everywhere)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_at_any_stage_equal_plain_torch(ranks, name: str) -> None:
    own = recipe(name)
    model = build_model(own)
    settled(model)
    optimizer, controllers = build_optimizer(model, own), build_controllers(own, model)
    losses = []
    for number in range(STEPS):
        losses.append(plain_step(model, optimizer, own, number, 2)[0])
        write(controllers, model, random_batch(own, 8, number))
    expected = [*losses, *moved(model)]
    assert losses[-1] != losses[0]
    for stage in STAGES:
        for found in ranks:
            assert found[f"{name}-{stage}"] == pytest.approx(expected, rel=2e-5)


def test_processes_whose_tokens_stop_differently_stay_together() -> None:
    first, second = run_ranks(2, train_apart)
    assert first == second
    for stage in STAGES[1:]:
        assert first[2 * stage : 2 * stage + 2] == pytest.approx(first[:2], rel=2e-5)
