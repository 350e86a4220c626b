"""Couplings, blocks and ghosts at every ZeRO stage on two processes, against plain torch.

Overlap, saturation and what ghosts learn are of one process's tokens, so plain torch takes the halves of
a batch one after the other. In the last steps the first process sends no token to a ghost.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed import config_of, cut, enlarge, held_weights, open_engine, recipe_of, run_ranks
from families import FAMILIES
from sra_ds.config import Recipe
from sra_ds.data.loader import random_batch
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.processes import mean_over_ranks
from sra_ds.seeds import generator
from sra_ds.storage import checkpoint
from sra_ds.storage.fragments import Fragment
from sra_ds.training.controllers import build_engine_controllers
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.controllers.schedules import learning_rate
from sra_ds.training.engine import build_optimizer, set_learning_rate
from sra_ds.training.engine_state import engine_state, restore_engine
from sra_ds.training.step import step_loss

SGD = {"kind": "sgd", "learning_rate": 0.1, "momentum": 0.9}
ADAM = {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "eps": 1e-5}
"""`eps` is above the rounding of gradients that are 0, as those of the keys' biases."""
EXPERTS, STEPS, APART, RAMP = 4, 6, 4, 3
"""Ghosts wake after the first step and the second; from step 4 on processes differ."""


class Kind(NamedTuple):
    """A recipe and the stages it is played at."""

    family: str
    stages: tuple[int, ...]
    optimizer: dict[str, Any] = SGD
    router: dict[str, Any] | None = None
    precision: str = "fp32"

    @property
    def ghosts(self) -> int:
        return 2 if self.family == "moe-ghost" else 0

    def recipe(self) -> Recipe:
        channel = {**FAMILIES[self.family]["channel"], "backend": "local"}
        training: dict[str, Any] = {
            "precision": self.precision,
            "gradient_clipping": 1.0,
            "optimizer": self.optimizer,
            "specialisation": {"tokens": 24},
        }
        if self.router is not None:
            channel["router"] = self.router
        if self.ghosts:
            channel["ghosts"] = {"count": self.ghosts, "background": True}
            often = {"patience": 1, "every": 1, "min_step": 1}
            training["ghosts"] = {"threshold": 0.0, "ramp_steps": RAMP, **often}
        losses = {"balance": "none", "dispersion": "none", "z_weight": 0.0}
        return recipe_of(
            overlay={"model": {"channel": channel}, "training": training, "losses": losses}
        )


KINDS = {
    "gnn": Kind("moe-gnn", (1, 3)),
    "hgnn": Kind("moe-hgnn", (0, 2)),
    "block": Kind("moe-block", (1, 3)),
    "ghost": Kind("moe-ghost", (0, 1, 2, 3)),
    "ghost-adam": Kind("moe-ghost", (0, 2, 3), ADAM),
    "ghost-random": Kind("moe-ghost", (2, 3), router={"kind": "random", "temperature": 3.0}),
    "ghost-bf16": Kind("moe-ghost", (1, 2, 3), precision="bf16"),
}
ZERO3 = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
"""Nothing is kept gathered, as in a large model."""
CASES = [(name, stage) for name, kind in KINDS.items() for stage in kind.stages]
GHOSTS = [case for case in CASES if KINDS[case[0]].ghosts]
EXACT = [case for case in CASES if KINDS[case[0]].precision == "fp32"]


class Told(NamedTuple):
    """What one process, or plain torch, knows of a short run."""

    losses: list[float]
    woken: list[tuple[int, int, int]]
    """Step, layer and number of each ghost."""
    alphas: list[Tensor]
    """Of each step, L x G."""
    loads: list[list[list[float]]]
    """Routes to ghosts in each step, by process and layer."""
    scores: list[float]
    weights: dict[str, Tensor]
    """That the model computes with."""
    saved: dict[str, Fragment]
    """This process's part of a checkpoint."""
    changed: list[str]
    """What did not come back from it."""


@torch.no_grad()
def lively(model: LanguageModel) -> None:
    """As `enlarge`; couplings and ghosts, too, do something from the start."""
    enlarge(model)
    for name, parameter in model.named_parameters():
        if ".ghosts." in name or (".coupling." in name and name.endswith(".out.weight")):
            parameter.normal_(0, 0.4, generator=generator(0, name))


class PlainEngine(nn.Module):
    """A model and its optimizer behind the names of an engine; its steps are those of two processes."""

    global_rank = 0

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


def play(engine: Any, own: Recipe, ranks: Sequence[int], folder: Path | None = None) -> Told:
    """A short run with its controllers on the windows of these processes, and a checkpoint of it."""
    controllers = build_engine_controllers(
        own, engine, lambda step: random_batch(own, 3, step), untrained=False
    )
    keeper, watch = controllers.get("ghosts"), controllers["specialisation"]
    losses, woken, alphas, loads = [], [], [], []
    for number in range(STEPS):
        peak = own.training.optimizer.learning_rate
        set_learning_rate(engine, learning_rate(own.training.schedule, peak, number, STEPS))
        if keeper is not None:
            keeper.on_step_start(number)
            alphas.append(torch.stack([r.ghost_alpha_G for r in engine.module.routers()]))
        loss, seen, load = one_step(engine, own, number, ranks)
        losses.append(loss)
        loads.append(load)
        if keeper is not None:
            events = keeper.on_step_end(number, seen)
            woken += [(number, event.layer, event.ghost) for event in events]
    scores, weights = watch.measure(0), held_weights(engine)
    state = fragments(engine)
    changed = [] if folder is None else come_back(engine, own, ranks, folder)
    return Told(losses, woken, alphas, loads, scores, weights, state, changed)


def one_step(
    engine: Any, own: Recipe, number: int, ranks: Sequence[int]
) -> tuple[float, Seen, list[list[float]]]:
    windows, losses, saturations, loads = random_batch(own, 8, number), [], [], []
    for rank in ranks:
        favour_experts(engine, number >= APART and rank == 0)
        output = engine(*cut(windows, slice(4 * rank, 4 * rank + 4)))
        loss = step_loss(output, own.losses).total
        engine.backward(loss)
        losses.append(loss.detach())
        saturations.append(torch.stack(output.saturations or [loss.detach()]))
        own_loads = [bincount(routing.expert_ids_TK) for routing in output.routings]
        loads.append([float(load_E[EXPERTS:].sum()) for load_E in own_loads])
    favour_experts(engine, False)
    engine.step()
    saturation_L = mean_over_ranks(torch.stack(saturations).mean(0))
    loss = mean_over_ranks(torch.stack(losses).mean())
    return float(loss), Seen(saturations=list(saturation_L)), loads


def favour_experts(engine: Any, favoured: bool) -> None:
    """So much that no ghost is chosen."""
    for router in engine.module.routers():
        router.selection_bias_E.fill_(1e4 if favoured else 0.0)


def bincount(ids_TK: Tensor) -> Tensor:
    return torch.bincount(ids_TK.flatten(), minlength=EXPERTS)


def fragments(engine: Any) -> dict[str, Fragment]:
    state = engine_state(engine)
    found = {**state.weights, **state.optimizer}
    return {name: Fragment(part, values.clone()) for name, (part, values) in found.items()}


def come_back(engine: Any, own: Recipe, ranks: Sequence[int], folder: Path) -> list[str]:
    """Names of what a checkpoint does not bring back after one more step."""
    state, before = engine_state(engine), fragments(engine)
    tensors = {checkpoint.WEIGHTS: state.weights, checkpoint.OPTIMIZER: state.optimizer}
    held = engine.module.routed_layers()[0].backend.experts.expert_ids
    layout = checkpoint.Layout(dist.get_world_size(), engine.zero_optimization_stage())
    checkpoint.save_checkpoint(folder, checkpoint.Contents(tensors, {}, {}, held), layout)
    one_step(engine, own, STEPS, ranks)
    stems = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
    restore_engine(engine, *[checkpoint.open_tensors(folder, stem) for stem in stems])
    after = fragments(engine)
    return [name for name in before if not torch.equal(before[name].values, after[name].values)]


def play_everywhere(folder: str) -> dict[tuple[str, int], tuple[Any, ...]]:
    """Each case on this process."""
    found = {}
    for name, stage in CASES:
        own = KINDS[name].recipe()
        config = config_of(stage)
        config["zero_optimization"] |= ZERO3 if stage == 3 else {}
        engine = open_engine(own, config, lively)
        place = Path(folder) / f"{name}{stage}"
        found[name, stage] = tuple(play(engine, own, [dist.get_rank()], place))
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Told]]:
    found = run_ranks(2, play_everywhere, str(tmp_path_factory.mktemp("zero")))
    return [{case: Told(*told) for case, told in own.items()} for own in found]


@cache
def plain(name: str) -> Told:
    own = KINDS[name]._replace(precision="fp32").recipe()
    return play(PlainEngine(own), own, [0, 1])


def whole_tensors(parts: Sequence[dict[str, Fragment]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint; each element is in one process's part, counts of steps in all."""
    found: dict[str, Tensor] = {}
    for own in parts:
        for name, (part, values) in own.items():
            whole = found.setdefault(name, torch.full(part.shape, torch.nan)).view(-1)
            held = whole[part.start : part.stop]
            assert held.isnan().all() or name.endswith("/step"), name
            held.copy_(values)
    return found


@pytest.mark.parametrize(("name", "stage"), EXACT)
def test_two_processes_at_any_stage_equal_plain_torch(ranks, name: str, stage: int) -> None:
    expected = plain(name)
    assert expected.losses[-1] != expected.losses[0]
    found = [own[name, stage] for own in ranks]
    for told in found:
        assert told.losses == pytest.approx(expected.losses, rel=2e-5)
        assert told.scores == pytest.approx(expected.scores, abs=1e-5)
        same(told.weights, expected.weights)
    same(whole_tensors([told.saved for told in found]), whole_tensors([expected.saved]))


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for path, tensor in expected.items():
        torch.testing.assert_close(
            found[path], tensor, rtol=2e-5, atol=2e-5, msg=lambda text, path=path: f"{path}: {text}"
        )


@pytest.mark.parametrize(("name", "stage"), GHOSTS)
def test_ghosts_wake_together_and_one_process_may_send_them_nothing(
    ranks, name: str, stage: int
) -> None:
    loads = []
    for own in ranks:
        told = own[name, stage]
        assert told.woken == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
        for step, alpha_LG in enumerate(told.alphas):
            waking = [min(1.0, max(0, step - woken) / RAMP) for woken in (0, 1)]
            assert alpha_LG.dtype == torch.float32
            assert torch.equal(alpha_LG, torch.tensor([waking] * 2))
        loads.append([load for (load,) in told.loads])
    first, second = loads
    assert first[0] == second[0] == [0.0, 0.0]
    assert all(min(load) > 0 for load in (*first[2:APART], *second[2:]))
    assert first[APART:] == [[0.0, 0.0]] * (STEPS - APART)


@pytest.mark.parametrize("stage", KINDS["ghost-adam"].stages)
def test_adam_counts_a_ghosts_steps_from_its_awakening(ranks, stage: int) -> None:
    saved = whole_tensors([own["ghost-adam", stage].saved for own in ranks])
    steps = {path: float(value) for path, value in saved.items() if path.endswith("/step")}
    for path, count in steps.items():
        ghost = next((g for g in range(2) if f".ghosts.{g}." in path or f"anchor{g}/" in path), -1)
        assert count == STEPS - (1 + ghost), path
    assert len(set(steps.values())) == 3


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_checkpoint_brings_everything_back(ranks, name: str, stage: int) -> None:
    assert [own[name, stage].changed for own in ranks] == [[], []]


@pytest.mark.parametrize("stage", KINDS["ghost-bf16"].stages)
def test_bf16_stays_finite_and_near(ranks, stage: int) -> None:
    for own in ranks:
        told = own["ghost-bf16", stage]
        assert told.losses == pytest.approx(plain("ghost-bf16").losses, rel=0.02)
        for path, weight in told.weights.items():
            assert weight.dtype == torch.bfloat16 and weight.isfinite().all(), path
