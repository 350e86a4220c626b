"""What a run says of its experts while it trains, on two processes in every layout, and by the command.

Each case trains six steps of 128 tokens and saves after three; a second trainer goes on from there.
Facts, alarms and remedies of both have to be the same, on both processes. All cases run in one start.
"""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from commands import step_lines, train
from distributed import config_of, cut, enlarge, held_weights, open_engine, recipe_of, run_ranks
from sra_ds.data.loader import Batch, random_batch
from sra_ds.inference.load import load_weights_into
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.storage import checkpoint
from sra_ds.storage.run_dir import RunDir
from sra_ds.training.controllers import build_controllers, build_engine_controllers
from sra_ds.training.ds_config import plan_batches
from sra_ds.training.engine import read_parameter
from sra_ds.training.engine_state import engine_state, forget_rows, restore_engine
from sra_ds.training.feed import WindowFeed
from sra_ds.training.health import Health
from sra_ds.training.loop import Trainer

ADAM = {"kind": "adamw", "learning_rate": 0.01}
FLOOR = {"raise_floor": {"floor": 0.5, "step": 100.0, "cap": 100.0}}
RESEED = {"reseed_dead_anchors": True}
LAYERS = 2
ANCHORS = "blocks.1.channel.moe.router.anchors"
STEPS, SAVED_AT = 6, 3
WINDOW = 256
"""Tokens of two steps."""


class Case(NamedTuple):
    """One run and its continuation."""

    stage: int
    ep: int = 1
    precision: str = "fp32"
    remedies: dict[str, Any] | None = None
    fewest: int = 7
    """Experts with tokens; the others are not chosen for a selection bias that is 100 lower."""

    def recipe(self) -> Any:
        remedies = {**(self.remedies or {}), "window_tokens": WINDOW} if self.remedies else {}
        training = {"optimizer": ADAM, "steps": STEPS, "precision": self.precision}
        overlay = {
            "training": {**training, "remedies": remedies},
            "checkpoint": {"every": SAVED_AT},
            "logging": {"every": 1},
        }
        return recipe_of(self.ep, overlay)

    def prepare(self, model: LanguageModel) -> None:
        enlarge(model)
        for router in model.routers():
            router.selection_bias_E[: self.fewest] = 100.0


CASES = {
    "collapsed-zero0": Case(0, remedies=FLOOR, fewest=2),
    "collapsed-zero3": Case(3, remedies=FLOOR, fewest=2),
    **{f"dead-zero{stage}": Case(stage, remedies=RESEED) for stage in range(4)},
    "dead-ep2-zero2": Case(2, ep=2, remedies=RESEED),
    "dead-ep2-bf16-zero3": Case(3, ep=2, precision="bf16", remedies=RESEED),
}


class Windows:
    """As many random tokens as are asked for."""

    count = 64

    def __init__(self, recipe: Any) -> None:
        self.recipe, self.length = recipe, recipe.data.sequence_length

    def batch(self, step: int, batch_size: int, part: slice = slice(None)) -> Batch:
        return cut(random_batch(self.recipe, batch_size, step), part)


def open_trainer(case: Case, folder: Path, start: Path | None = None) -> Trainer:
    """As `workflow.train` does it, but for data and validation."""
    recipe, world = case.recipe(), dist.get_world_size()
    fill = case.prepare if start is None else (lambda model: load_weights_into(model, start))
    engine = open_engine(recipe, config_of(case.stage), fill)
    run, windows = RunDir(folder), Windows(recipe)
    if dist.get_rank() == 0:
        run.write_start(recipe, {}, {})
    dist.barrier()
    if start is not None:
        stems = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
        restore_engine(engine, *[checkpoint.open_tensors(start, stem) for stem in stems])
    controllers = build_controllers(recipe, engine.module)
    controllers |= build_engine_controllers(
        recipe, engine, lambda step: windows.batch(step, 8), untrained=False
    )
    layout = checkpoint.Layout(world, case.stage, case.ep)
    plan = plan_batches(recipe, world)
    feed = WindowFeed(windows, plan, dist.get_rank())
    trainer = Trainer(recipe, run, engine, feed, plan, layout, controllers, score, 1.0)
    if start is not None:
        trainer.restore(start)
    return trainer


def score(engine: Any, tokens: int, stopped: Any) -> dict[str, float]:
    del engine, tokens, stopped
    return {"token_perplexity": 2.0, "accuracy": 0.5, "capped_nll_per_token": 0.7}


def play(folder: str) -> dict[str, Any]:
    """Every case on this process: its anchors after the run and after its continuation."""
    return {name: play_case(case, Path(folder) / name) for name, case in CASES.items()}


def play_case(case: Case, folder: Path) -> dict[str, Any]:
    ends = []
    for number, start in enumerate([None, folder / "0" / "checkpoints" / str(SAVED_AT)]):
        trainer = open_trainer(case, folder / str(number), start)
        trainer.run()
        engine = trainer.engine
        anchors_ED = read_parameter(engine.module.get_parameter(ANCHORS))
        ends.append({"anchors": anchors_ED, "held": held_weights(engine)[ANCHORS]})
        if start is not None:
            before = moments(engine)
            forget_rows(engine, engine.module.get_parameter(ANCHORS), [1, 4])
            ends.append({"before": before, "after": moments(engine)})
        engine.destroy()
    return {"whole": ends[0], "resumed": ends[1], "moments": ends[2]}


def moments(engine: Any) -> dict[str, tuple[int, Tensor]]:
    """What this process holds of the moments of the anchors: the first element, and the values."""
    held = engine_state(engine).optimizer
    names = (f"{ANCHORS}/exp_avg", f"{ANCHORS}/exp_avg_sq")
    return {
        name: (held[name].range.start, held[name].values.clone()) for name in names if name in held
    }


class Played(NamedTuple):
    """All cases on both processes."""

    folder: Path
    ranks: list[dict[str, Any]]

    def lines(self, name: str, number: int) -> list[dict[str, Any]]:
        """Metrics of the whole run (0) or of its continuation (1), without what time decides."""
        timed = ("time", "tokens_per_second", "mfu")
        lines = RunDir(self.folder / name / str(number)).metrics()
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Alarms or remedies of the whole run, with their steps."""
        found = [line for line in self.lines(name, 0) if kind in line]
        return [{"step": line["step"], **line[kind]} for line in found]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("health")
    return Played(folder, run_ranks(2, play, str(folder)))


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_says_and_does_the_same(played: Played, name: str) -> None:
    whole, resumed = played.lines(name, 0), played.lines(name, 1)
    assert [line for line in whole if line["step"] > SAVED_AT] == resumed
    for found in played.ranks:
        for copy in ("anchors", "held"):
            assert torch.equal(found[name]["whole"][copy], found[name]["resumed"][copy])


@pytest.mark.parametrize("name", CASES)
def test_both_processes_do_the_same(played: Played, name: str) -> None:
    first, second = (found[name]["whole"] for found in played.ranks)
    assert all(torch.equal(first[copy], second[copy]) for copy in first)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("collapsed")])
def test_a_collapse_is_told_of_once_and_its_end_too(played: Played, name: str) -> None:
    """All tokens go to two of eight experts, until the floor of the others is raised after two steps."""
    alarms = played.events(name, "alarm")
    told = [(a["step"], a["kind"], a["layer"], a["state"]) for a in alarms]
    assert told == [
        *((1, "collapse", layer, "begins") for layer in range(LAYERS)),
        *((3, "collapse", layer, "ends") for layer in range(LAYERS)),
    ]
    assert alarms[0]["value"] == pytest.approx(2 / 8) and alarms[0]["threshold"] == 2.3 / 8
    lines = [line for line in played.lines(name, 0) if "loss" in line]
    for alarm in alarms:
        layer = lines[alarm["step"] - 1]["layers"][alarm["layer"]]
        assert alarm["value"] == layer["effective_experts"]
    assert lines[0]["layers"][0]["load_histogram"] == [0.75, *[0.0] * 8, 0.25, 0.0]
    assert lines[0]["layers"][0]["max_violation"] == pytest.approx(3.0)
    remedies = played.events(name, "remedy")
    assert [(r["step"], r["kind"], r["layer"], r["experts"]) for r in remedies] == [
        (2, "raise_floor", layer, [2, 3, 4, 5, 6, 7]) for layer in range(LAYERS)
    ]
    assert {(*r["before"], *r["after"]) for r in remedies} == {(*[0.0] * 6, *[100.0] * 6)}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("dead")])
def test_a_dead_anchor_is_given_anew_at_the_end_of_each_window(played: Played, name: str) -> None:
    remedies = played.events(name, "remedy")
    assert [(r["step"], r["kind"], r["layer"], r["experts"], r["load"]) for r in remedies] == [
        (step, "reseed_dead_anchors", layer, [7], [0.0])
        for step in (2, 4, 6)
        for layer in range(LAYERS)
    ]
    anchors_ED = played.ranks[0][name]["whole"]["anchors"]
    assert anchors_ED[7].norm() == pytest.approx(1.0)
    lines = [line for line in played.lines(name, 0) if "loss" in line]
    drifts = [line["layers"][1]["anchor_drift"] for line in lines]
    assert 0 < drifts[0] < 0.01 and drifts[1] > 10 * drifts[0]  # steps, and a new anchor
    assert {line["layers"][1]["dead_fraction"] for line in lines} == {1 / 8}


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_forgets_these_rows_alone(played: Played, name: str) -> None:
    for key in ("exp_avg", "exp_avg_sq"):
        path, whole = f"{ANCHORS}/{key}", {}
        for when in ("before", "after"):
            flat = torch.full((8 * 32,), torch.nan)
            for found in played.ranks:
                start, values = found[name]["moments"][when].get(path, (0, torch.empty(0)))
                flat[start : start + len(values)] = values
            whole[when] = flat.view(8, 32)
        kept = [0, 2, 3, 5, 6, 7]
        assert (whole["after"][[1, 4]] == 0).all() and whole["before"][[1, 4]].any()
        assert torch.equal(whole["after"][kept], whole["before"][kept])


def test_checkpoints_of_every_layout_hold_where_the_anchors_began(played: Played) -> None:
    started = []
    for name, case in CASES.items():
        folder = played.folder / name / "1" / "checkpoints" / str(STEPS)
        files = checkpoint.open_tensors(folder, checkpoint.OPTIMIZER)
        assert files.shape(f"{ANCHORS}/start") == (8, 32)
        if case.precision == "fp32":
            started.append(files.read(f"{ANCHORS}/start"))
    assert all(torch.equal(anchors_ED, started[0]) for anchors_ED in started)


@pytest.mark.parametrize(
    ("family", "figures"),
    [
        ("moe-cosine", {"temperature", "top_gate", "anchor_drift"}),
        ("moe-linear", {"top_gate", "anchor_drift"}),
        ("moe-hash", set()),
        ("moe-swiglu-shared", {"temperature", "top_gate", "anchor_drift"}),
    ],
)
def test_figures_by_the_kind_of_router(tiny_recipe: Any, family: str, figures: set[str]) -> None:
    recipe = tiny_recipe(family)
    model = build_model(recipe)
    health = Health(model)
    assert health.shown() == {} and health.facts([]) == {}
    with torch.no_grad():
        routings = model(*random_batch(recipe, 4, 0)).routings
    health.recent.add(routings, 64)
    layers = health.facts(routings)["layers"]
    assert len(layers) == 2
    for layer, routing in zip(layers, routings, strict=True):
        assert {"temperature", "top_gate", "anchor_drift"} & layer.keys() == figures
        assert sum(layer["load_histogram"]) == pytest.approx(1)
        if "top_gate" in figures:
            assert layer["top_gate"] == pytest.approx(routing.gates_TK.amax(-1).mean().item())
        if "anchor_drift" in figures:
            assert layer["anchor_drift"] == 0.0
    assert json.loads(json.dumps(health.state_dict())) == health.state_dict()


def test_a_gate_of_one_expert_tells_nothing_unless_it_is_a_probability(tiny_recipe: Any) -> None:
    for gate, told in (("all", True), ("selected", False), ("straight_through", False)):
        overlay = {"model": {"channel": {"top_k": 1, "router": {"kind": "cosine", "gate": gate}}}}
        recipe = tiny_recipe("moe-cosine", overlay)
        model = build_model(recipe)
        with torch.no_grad():
            health, routings = Health(model), model(*random_batch(recipe, 4, 0)).routings
        health.recent.add(routings, 64)
        assert ("top_gate" in health.facts(routings)["layers"][0]) == told


@pytest.mark.parametrize("memory", ["none", "static"])
def test_drift_of_anchors_that_were_turned_is_the_known_one(tiny_recipe: Any, memory: str) -> None:
    """A static memory has a router of its own, which is no layer's."""
    model = build_model(tiny_recipe("moe-cosine", {"model": {"memory": {"kind": memory}}}))
    health, angle = Health(model), 0.4
    first = model.routers()[0].anchors
    plane = torch.eye(32)
    plane[:2, :2] = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    with torch.no_grad():
        expected = first[:, :2].square().sum(-1).mean() * (1 - math.cos(angle))  # unit anchors
        first.copy_(2 * first @ plane.T)
    assert health.drift.by_layer() == [pytest.approx(expected.item(), rel=1e-5), 0.0]


def test_of_a_checkpoint_that_kept_no_start_no_drift_is_told(tiny_recipe: Any) -> None:
    health = Health(build_model(tiny_recipe()))
    health.drift.load(SimpleNamespace(names=["other/exp_avg"]))
    assert health.drift.by_layer() is None and health.drift.fragments() == {}


def test_the_bar_shows_the_worst_layer_and_the_first_alarm(tiny_recipe: Any) -> None:
    health = Health(build_model(tiny_recipe()))
    even, crowded = torch.full((4,), 32.0), torch.tensor([64.0, 64.0, 0.0, 0.0])
    ids_TK = torch.zeros(64, 2)
    loads = [SimpleNamespace(load_E=load_E, expert_ids_TK=ids_TK) for load_E in (even, crowded)]
    health.recent.add(loads, 64)
    assert health.shown() == {"dead": "2", "viol": "1.0", "eff": "0.50"}
    begun = health.alarms([{"effective_experts": 0.5}, {"effective_experts": 0.5}])
    assert [alarm.layer for alarm in begun] == [0, 1]
    assert health.shown()["ALARM"] == "collapse@0+1"
    other = Health(build_model(tiny_recipe()))
    other.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert other.shown() == health.shown()
    assert other.alarms([{"effective_experts": 0.5}, {"effective_experts": 0.5}]) == []
    assert len(other.alarms([{"effective_experts": 1.0}, {"effective_experts": 1.0}])) == 2
    assert "ALARM" not in other.shown()


def test_the_command_tells_and_resumes_with_remedies_on(tiny: Path, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = ("training.remedies.raise_floor.floor=0.9", "training.remedies.window_tokens=512")
    result = train("--recipe", tiny / "tiny.yaml", "--run", whole, *overrides)
    assert result.returncode == 0, result.stderr
    assert "viol=" in result.stderr and "eff=" in result.stderr
    assert "remedy raise_floor in layer" in result.stderr
    shutil.copytree(whole, resumed, symlinks=True)
    shutil.rmtree(resumed / "checkpoints" / "12")
    (resumed / "checkpoints" / "latest").write_text("8")
    (resumed / "summary.json").unlink()
    result = train("--resume", "--run", resumed)
    assert result.returncode == 0, result.stderr
    told = [
        [line for line in RunDir(run).metrics() if "remedy" in line] for run in (whole, resumed)
    ]
    for line in (*told[0], *told[1]):
        del line["time"]
    assert told[0] == told[1] and {line["step"] % 2 for line in told[0]} == {0}
    assert [x["layers"] for x in step_lines(resumed)] == [x["layers"] for x in step_lines(whole)]
    drifts = [line["layers"][0]["anchor_drift"] for line in step_lines(whole)]
    assert drifts == sorted(drifts) and drifts[-1] > 0
    files = [
        load_file(run / "checkpoints" / "12" / "model.safetensors") for run in (whole, resumed)
    ]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
