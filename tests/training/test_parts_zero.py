"""The parts of the Semantic Resonance LM and of SpectralLLM at every ZeRO stage on two processes, against
plain torch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

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
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.processes import mean_over_ranks
from sra_ds.training.controllers import build_controllers
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.engine import build_optimizer

RESONANCE = ("resonance", "resonance-moe", "resonance-blocks")
SPECTRAL = ("spectral", "spectral-hybrid", "spectral-controls")
NAMES = (*RESONANCE, *SPECTRAL)
STAGES, STEPS = (0, 1, 2, 3), 4
RATES = {"resonance": 1e-4, "spectral-controls": 0.01}
"""Of families whose enlarged weights give large losses; of the others 0.1."""


def recipe(name: str) -> Recipe:
    """With the losses of its parts; the ratio's ramp ends on the way, after two steps."""
    training = {"steps": STEPS, "optimizer": {"kind": "sgd", "learning_rate": RATES.get(name, 0.1)}}
    losses: dict[str, Any] = {"balance": "none", "dispersion": "none", "z_weight": 0.0}
    model = FAMILIES[name]
    if name in RESONANCE and model["mixer"].get("halting") != "hard":
        losses["ponder_weight"] = 0.05
    if name == "spectral-hybrid":
        model = {**model, "embedding": {**model["embedding"], "ramp": 0.5}}
    if name == "spectral":
        losses["wavelet_weight"] = 0.5
    return recipe_of(overlay={"model": model, "training": training, "losses": losses})


def settled(model: LanguageModel) -> None:
    """As `enlarge`, and no threshold that rounding could cross: untrained weights go through unscaled."""
    enlarge(model)
    for block in model.blocks:
        if hasattr(block.mixer, "halting"):
            block.mixer.threshold = 0.0 if block.mixer.halting == "hard" else 0.5


def set_by_controllers(model: LanguageModel) -> list[float]:
    """How far documents' starts have moved, and where the ratio's ramp is."""
    starts = [float(memory.start_state_HCC.norm()) for memory in model.persistent_memories()]
    ramps = [float(value) for name, value in model.named_buffers() if name.endswith("ramp")]
    return starts + ramps


def play(
    own: Recipe, model: Any, module: LanguageModel, step: Callable[[int], float]
) -> list[float]:
    """The losses of a short run with its controllers, and what they set."""
    controllers, losses = build_controllers(own, module), []
    for number in range(STEPS):
        for controller in controllers.values():
            controller.on_step_start(number)
        losses.append(step(number))
        if "memory" in controllers:
            states = memory_states(model, random_batch(own, 8, number))
            controllers["memory"].on_step_end(number, Seen(memory_states_HCC=states))
    return losses + set_by_controllers(module)


@torch.no_grad()
def memory_states(model: Any, batch: Batch) -> list[Tensor]:
    """Where windows end, over all processes, of which each looks at its own."""
    if not dist.is_initialized():
        return model(*batch).memory_states_HCC
    part = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    states = model(*(None if t is None else t[part] for t in batch)).memory_states_HCC
    return [mean_over_ranks(state) for state in states]


def by_engine(name: str, stage: int) -> list[float]:
    own = recipe(name)
    engine = open_engine(own, config_of(stage), settled)
    return play(own, engine, engine.module, lambda n: engine_step(engine, own, n)[0])


def by_torch(name: str) -> list[float]:
    own = recipe(name)
    model = build_model(own)
    settled(model)
    optimizer = build_optimizer(model, own)
    return play(own, model, model, lambda n: plain_step(model, optimizer, own, n, 2)[0])


def train_everywhere() -> dict[str, list[float]]:
    return {f"{name}-{stage}": by_engine(name, stage) for name in NAMES for stage in STAGES}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[float]]]:
    return run_ranks(2, train_everywhere)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_at_any_stage_equal_plain_torch(ranks, name: str) -> None:
    expected = by_torch(name)
    for stage in STAGES:
        for found in ranks:
            assert found[f"{name}-{stage}"] == pytest.approx(expected, rel=2e-5)


def train_apart() -> list[float]:
    """Losses at each stage where every token of the first process stops at once, none of the other."""
    own, losses = recipe("resonance-moe"), []
    for stage in STAGES:
        engine = open_engine(own, config_of(stage), settled)
        for block in engine.module.blocks:
            block.mixer.threshold = 0.0 if dist.get_rank() else 2.0
        losses += [engine_step(engine, own, number)[0] for number in range(2)]
    return losses


def test_processes_whose_tokens_stop_differently_stay_together() -> None:
    first, second = run_ranks(2, train_apart)
    assert first == second
    for stage in STAGES[1:]:
        assert first[2 * stage : 2 * stage + 2] == pytest.approx(first[:2], rel=2e-5)
