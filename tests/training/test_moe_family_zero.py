"""Couplings, blocks and ghosts at every ZeRO stage on two processes, against plain torch.

Overlap, saturation and what ghosts learn are of one process's tokens, so plain torch takes the halves of
a batch one after the other.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import config_of, cut, enlarge, held_weights, open_engine, recipe_of, run_ranks
from families import FAMILIES
from sra_ds.config import Recipe
from sra_ds.model.init import generator
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.training.bench import random_batch
from sra_ds.training.controllers import Seen, learning_rate
from sra_ds.training.engine import build_optimizer, set_learning_rate
from sra_ds.training.ghosts import build_ghost_keeper
from sra_ds.training.processes import mean_over_ranks
from sra_ds.training.specialisation import Specialisation
from sra_ds.training.step import step_loss

STAGES = {"moe-gnn": (1, 3), "moe-hgnn": (0, 2), "moe-block": (1, 3), "moe-ghost": (0, 1, 2, 3)}
CASES = [(name, stage) for name, stages in STAGES.items() for stage in stages]
STEPS, APART = 6, 4
"""Steps, and the first in which one process routes nothing to ghosts."""
RAMP = 3


def recipe(name: str, precision: str = "fp32") -> Recipe:
    """With momentum, of which a ghost that wakes must keep none."""
    channel = {**FAMILIES[name]["channel"], "backend": "local"}
    training: dict[str, Any] = {
        "precision": precision,
        "gradient_clipping": 1.0,
        "optimizer": {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9},
        "specialisation": {"tokens": 24},
    }
    if name == "moe-ghost":
        channel["ghosts"] = {"count": 2, "background": True}
        training["ghosts"] = {
            "threshold": 0.0,
            "patience": 1,
            "every": 1,
            "min_step": 1,
            "ramp_steps": RAMP,
        }
    losses = {"balance": "none", "dispersion": "none", "z_weight": 0.0}
    return recipe_of(
        overlay={"model": {"channel": channel}, "training": training, "losses": losses}
    )


@torch.no_grad()
def lively(model: LanguageModel) -> None:
    """As `enlarge`; couplings and ghosts, too, do something from the start."""
    enlarge(model)
    for name, parameter in model.named_parameters():
        if ".ghosts." in name or (".coupling." in name and name.endswith(".out.weight")):
            parameter.normal_(0, 0.4, generator=generator(0, name))


class PlainEngine(nn.Module):
    """A model and its optimizer behind the names of an engine; its steps are those of two processes."""

    def __init__(self, own: Recipe) -> None:
        super().__init__()
        self.module = build_model(own)
        lively(self.module)
        self.optimizer = build_optimizer(self.module, own)

    def zero_optimization_stage(self) -> int:
        return 0

    def forward(self, *batch: Any) -> Any:
        return self.module(*batch)

    def backward(self, loss: Tensor) -> None:
        (loss / 2).backward()

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def play(engine: Any, own: Recipe, ranks: Sequence[int]) -> dict[str, Any]:
    """A short run with its controllers, on the windows of these processes."""
    keeper = build_ghost_keeper(own, engine).get("ghosts")
    watch = Specialisation(own, engine, lambda step: random_batch(own, 3, step))
    found: dict[str, Any] = {name: [] for name in ("losses", "events", "alpha", "given")}
    for number in range(STEPS):
        peak = own.training.optimizer.learning_rate
        set_learning_rate(engine, learning_rate(own.training.schedule, peak, number, STEPS))
        if keeper is not None:
            keeper.on_step_start(number)
            found["alpha"].append([r.ghost_alpha_G.tolist() for r in engine.module.routers()])
        mean_loss, seen = one_step(engine, own, number, ranks, found)
        found["losses"].append(mean_loss)
        if keeper is not None:
            found["events"] += [tuple(event) for event in keeper.on_step_end(number, seen)]
    found["scores"] = watch.measure(0)
    found["weights"] = held_weights(engine)
    return found


def one_step(
    engine: Any, own: Recipe, number: int, ranks: Sequence[int], found: dict[str, Any]
) -> tuple[float, Seen]:
    windows, losses, saturations = random_batch(own, 8, number), [], []
    for rank in ranks:
        only_experts = number >= APART and rank == 0
        for router in engine.module.routers():
            router.selection_bias_E.fill_(1e4 if only_experts else 0.0)
        output = engine(*cut(windows, slice(4 * rank, 4 * rank + 4)))
        loss = step_loss(output, own.losses).total
        engine.backward(loss)
        losses.append(loss.detach())
        saturations.append(torch.stack(output.saturations or [loss.detach()]))
        given = [
            routing.load_E[own.model.channel.experts :].tolist() for routing in output.routings
        ]
        found["given"].append((number, rank, given))
    engine.step()
    found_L = mean_over_ranks(torch.stack(saturations).mean(0))
    loss = float(mean_over_ranks(torch.stack(losses).mean()))
    return loss, Seen(saturations=list(found_L))


def play_everywhere() -> dict[tuple[str, int], dict[str, Any]]:
    """Each case on this process."""
    found = {}
    for name, stage in CASES:
        own = recipe(name)
        engine = open_engine(own, config_of(stage), lively)
        found[name, stage] = play(engine, own, [dist.get_rank()])
        engine.destroy()
    own = recipe("moe-ghost", "bf16")
    engine = open_engine(own, config_of(2), lively)
    found["bf16", 2] = play(engine, own, [dist.get_rank()])
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, int], dict[str, Any]]]:
    return run_ranks(2, play_everywhere)


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, Any]]:
    return {name: play(PlainEngine(recipe(name)), recipe(name), [0, 1]) for name in STAGES}
