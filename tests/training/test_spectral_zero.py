"""The parts of SpectralLLM at every ZeRO stage on two processes, against plain torch."""

from typing import Any

import pytest

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
from sra_ds.model.language_model import build_model
from sra_ds.training.controllers import build_controllers
from sra_ds.training.engine import build_optimizer

NAMES = ("spectral", "spectral-hybrid", "spectral-controls")
STAGES, STEPS = (0, 1, 2, 3), 5


def recipe(name: str) -> Recipe:
    """The ratio's ramp ends on the way, after two steps."""
    training = {"steps": STEPS, "optimizer": {"kind": "sgd", "learning_rate": 0.1}}
    losses: dict[str, Any] = {"balance": "none", "dispersion": "none", "z_weight": 0.0}
    model = {**FAMILIES[name], "embedding": dict(FAMILIES[name]["embedding"])}
    if name == "spectral-hybrid":
        model["embedding"]["ramp"] = 0.4
    if name == "spectral":
        losses["wavelet_weight"] = 0.5
    return recipe_of(overlay={"model": model, "training": training, "losses": losses})


def facts_of(model: Any) -> list[float]:
    """Of what is read outside of forward passes."""
    return [float(p.detach().sum()) for n, p in model.named_buffers() if n.endswith("ramp")]


def train_everywhere() -> dict[str, list[float]]:
    """Losses of each family at each stage."""
    found = {}
    for name in NAMES:
        for stage in STAGES:
            own = recipe(name)
            engine = open_engine(own, config_of(stage), enlarge)
            controllers = build_controllers(own, engine.module)
            losses = []
            for number in range(STEPS):
                for controller in controllers.values():
                    controller.on_step_start(number)
                losses.append(engine_step(engine, own, number)[0])
            found[f"{name}-{stage}"] = [*losses, *facts_of(engine.module)]
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list[float]]]:
    return run_ranks(2, train_everywhere)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_at_any_stage_equal_plain_torch(ranks, name: str) -> None:
    own = recipe(name)
    model = build_model(own)
    enlarge(model)
    optimizer, controllers = build_optimizer(model, own), build_controllers(own, model)
    losses = []
    for number in range(STEPS):
        for controller in controllers.values():
            controller.on_step_start(number)
        losses.append(plain_step(model, optimizer, own, number, 2)[0])
    expected = [*losses, *facts_of(model)]
    assert losses[-1] != losses[0]
    for stage in STAGES:
        for found in ranks:
            assert found[f"{name}-{stage}"] == pytest.approx(expected, rel=2e-5)
