"""Ghosts: when they wake, how they start, and that asleep they are not there."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from commands import launch, step_lines, train
from references import randomise
from saved_runs import corpus
from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.evaluation.perplexity import Setting, evaluate
from sra_ds.model.language_model import LanguageModel, build_model
from sra_ds.training.controllers import build_engine_controllers
from sra_ds.training.controllers.ghosts import Awakening, GhostKeeper
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.engine import build_optimizer, set_learning_rate
from sra_ds.training.step import step_loss

__all__ = ["corpus"]

Builder = Callable[..., Recipe]
LAYERS = 2
PEAK = 0.01


class PlainEngine(nn.Module):
    """A model and its optimizer behind the names of an engine at ZeRO stage 0."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.module = recipe, build_model(recipe)
        randomise(self.module, 0.2)
        self.optimizer = build_optimizer(self.module, recipe)

    def zero_optimization_stage(self) -> int:
        return 0

    def train_step(self, number: int) -> None:
        batch = random_batch(self.recipe, self.recipe.training.batch_size, number)
        step_loss(self.module(*batch), self.recipe.losses).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def alphas(self) -> list[list[float]]:
        return [router.ghost_alpha_G.tolist() for router in self.module.routers()]

    def rates(self) -> dict[str, float]:
        return {group["name"]: group["lr"] for group in self.optimizer.param_groups}


@pytest.fixture
def engine_with(tiny_recipe: Builder) -> Callable[..., PlainEngine]:
    """`engine_with(count, background, training, **schedule)`: two layers with so many ghosts each."""

    def build(
        count: int = 3,
        background: bool = False,
        training: dict[str, Any] | None = None,
        **schedule: Any,
    ) -> PlainEngine:
        usual = {"threshold": 0.5, "patience": 1, "every": 1, "min_step": 0, "window": 1}
        ghosts = {"count": count, "background": background}
        optimizer = {"kind": "adamw", "learning_rate": PEAK}
        own = {"optimizer": optimizer, "ghosts": {**usual, **schedule}, **(training or {})}
        overlay = {"model": {"channel": {"ghosts": ghosts}}, "training": own}
        return PlainEngine(tiny_recipe("moe-ghost", overlay))

    return build


def no_batch(step: int) -> Batch:
    raise AssertionError(f"nobody looks at the batch of step {step}")


def keeper_of(engine: PlainEngine) -> GhostKeeper:
    keeper = build_engine_controllers(engine.recipe, engine, no_batch, untrained=False)["ghosts"]
    assert isinstance(keeper, GhostKeeper)
    return keeper


def take_step(keeper: GhostKeeper, step: int, *saturations: float) -> list[Awakening]:
    """A step whose layers were so saturated."""
    keeper.on_step_start(step)
    found = keeper.on_step_end(step, Seen(saturations=[torch.tensor(s) for s in saturations]))
    return [event for event in found if isinstance(event, Awakening)]


def woken(keeper: GhostKeeper, *layers: Sequence[float]) -> list[tuple[int, int, int]]:
    """Step, layer and number of each ghost that wakes, with the saturation of every step by layer."""
    return [
        (step, event.layer, event.ghost)
        for step, found in enumerate(zip(*layers, strict=True))
        for event in take_step(keeper, step, *found)
    ]


def test_a_ghost_wakes_after_enough_checks_in_a_row(engine_with) -> None:
    keeper = keeper_of(engine_with(patience=3, every=2))
    constant = [0.0, 0.51] * 8  # what lies between checks is forgotten by a window of one step
    broken = [0.9] * 4 + [0.9, 0.5] + [0.9] * 10  # the threshold itself is not above it
    assert woken(keeper, constant, broken) == [(5, 0, 0), (11, 0, 1), (11, 1, 0)]


@pytest.mark.parametrize(("every", "first"), [(1, 5), (4, 7), (6, 5)])
def test_no_ghost_wakes_before_its_time(engine_with, every: int, first: int) -> None:
    engine = engine_with(count=1, min_step=6, every=every)
    keeper = keeper_of(engine)
    for step in range(first + 1):
        found = take_step(keeper, step, 1.0, 1.0)
        assert engine.alphas() == [[0.0]] * LAYERS
        assert [event.layer for event in found] == ([0, 1] if step == first else [])
    keeper.on_step_start(first + 1)
    assert first + 1 >= 6 and all(alpha > 0 for (alpha,) in engine.alphas())


def test_one_ghost_of_a_layer_wakes_at_a_check_in_order_and_none_that_is_not_there(
    engine_with,
) -> None:
    keeper = keeper_of(engine_with(count=2))
    high, late = [1.0] * 6, [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert woken(keeper, high, late) == [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)]


def test_patience_begins_anew_with_each_ghost(engine_with) -> None:
    keeper = keeper_of(engine_with(patience=2))
    assert woken(keeper, [1.0] * 6, [0.0] * 6) == [(1, 0, 0), (3, 0, 1), (5, 0, 2)]


def test_saturation_is_a_mean_in_which_new_steps_weigh_more(engine_with) -> None:
    keeper = keeper_of(engine_with(window=3, threshold=0.8))
    keeper.on_step_end(0, Seen(saturations=[torch.tensor(0.0), torch.tensor(1.0)]))
    assert keeper.saturation == [0.0, 1.0]
    assert take_step(keeper, 1, 1.0, 0.0) == [] and keeper.saturation == [0.5, 0.5]
    assert take_step(keeper, 2, 1.0, 0.0) == [] and keeper.saturation == [0.75, 0.25]
    assert take_step(keeper, 3, 1.0, 0.0) == [Awakening(0, 0, 0.875)]


@pytest.mark.parametrize("ramp", [1, 3, 7])
def test_alpha_rises_in_equal_steps_to_one_and_stays(engine_with, ramp: int) -> None:
    engine = engine_with(ramp_steps=ramp)
    keeper, found = keeper_of(engine), []
    for step in range(ramp + 6):
        take_step(keeper, step, float(step == 2), 0.0)
        found.append(torch.tensor(engine.alphas()))
    expected = [0.0] * 3 + [(n + 1) / ramp for n in range(ramp)] + [1.0] * 3
    assert torch.equal(torch.stack(found)[:, 0, 0], torch.tensor(expected))
    assert not torch.stack(found)[:, 1].any() and not torch.stack(found)[:, :, 1:].any()
    first, second = engine.module.routers()
    assert first.awake == 1 and first.shift_S() is None and second.awake == 0


def test_alpha_keeps_its_precision_in_a_bf16_model(engine_with) -> None:
    engine = engine_with(ramp_steps=7)
    engine.module.bfloat16()
    keeper = keeper_of(engine)
    for step in range(4):
        take_step(keeper, step, 1.0, 0.0)
    assert torch.equal(
        engine.module.routers()[0].ghost_alpha_G, torch.tensor([3 / 7, 2 / 7, 1 / 7])
    )


SHARE = 0.7
"""Of the peak, what is scheduled for step 3 of 10 on a line."""


@pytest.mark.parametrize(
    ("form", "expected"),
    [("inverse", 1 - SHARE), ("complementary", 0.5 * (1 - SHARE) + 0.1), ("same", SHARE)],
)
def test_a_ghost_has_a_learning_rate_of_its_own(engine_with, form: str, expected: float) -> None:
    schedule = {"steps": 10, "schedule": {"kind": "linear"}}
    engine = engine_with(count=2, training=schedule, learning_rate=form, ramp_steps=4)
    keeper = keeper_of(engine)
    for step in range(3):
        take_step(keeper, step, 0.0, float(step == 0))
    set_learning_rate(engine, SHARE * PEAK)
    keeper.on_step_start(3)
    names = {f"ghost {layer}.{ghost}" for layer in range(LAYERS) for ghost in range(2)}
    assert set(engine.rates()) == names | {"decayed", "plain"}
    expected_rates = dict.fromkeys(engine.rates(), SHARE * PEAK)
    expected_rates["ghost 1.0"] = pytest.approx(3 / 4 * expected * PEAK)
    assert engine.rates() == expected_rates


def test_the_group_of_a_ghost_is_its_anchor_and_its_network(engine_with) -> None:
    engine = engine_with(count=2)
    paths = {id(parameter): path for path, parameter in engine.module.named_parameters()}
    for group in engine.optimizer.param_groups:
        if group["name"].startswith("ghost"):
            layer, ghost = group["name"].split()[1].split(".")
            inside = f"blocks.{layer}.channel.moe"
            names = {paths[id(parameter)] for parameter in group["params"]}
            networks = [path for path in paths.values() if f"{inside}.ghosts.{ghost}." in path]
            assert names == {f"{inside}.router.ghost_anchor{ghost}", *networks}
            assert len(networks) == 4 and group["weight_decay"] == 0


def test_the_optimizer_forgets_the_ghost_that_wakes_and_nothing_else(engine_with) -> None:
    engine = engine_with(count=2)
    keeper = keeper_of(engine)
    for parameter in engine.module.parameters():
        parameter.grad = torch.randn_like(parameter)
    engine.optimizer.step()
    weights = copy.deepcopy(engine.module.state_dict())
    before = states(engine)
    assert all(tensor.any() for tensor in before.values())
    assert [event.layer for event in take_step(keeper, 0, 0.0, 1.0)] == [1]
    inside = "blocks.1.channel.moe"
    forgotten = [
        name
        for name in before
        if f"{inside}.ghosts.0." in name or "1.channel.moe.router.ghost_anchor0" in name
    ]
    assert len(forgotten) == 5 * 3
    for name, tensor in states(engine).items():
        assert torch.equal(tensor, torch.zeros_like(tensor) if name in forgotten else before[name])
    for name, tensor in engine.module.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def states(engine: PlainEngine) -> dict[str, Tensor]:
    """Copies of what the optimizer keeps of each parameter."""
    return {
        f"{name}/{key}": value.clone()
        for name, parameter in engine.module.named_parameters()
        for key, value in engine.optimizer.state[parameter].items()
    }


def test_learning_in_the_background_is_forgotten_too(engine_with) -> None:
    engine = engine_with(count=1, background=True)
    for number in range(2):
        engine.train_step(number)
    ghost = engine.module.routed_layers()[0].ghosts[0]
    steps = [engine.optimizer.state[parameter]["step"] for parameter in ghost.parameters()]
    assert [float(step) for step in steps] == [2.0] * 4
    take_step(keeper_of(engine), 2, 1.0, 0.0)
    assert [float(step) for step in steps] == [0.0] * 4


def twins(tiny_recipe: Builder, family: str) -> tuple[PlainEngine, PlainEngine]:
    """A model without ghosts and one with the same weights and two ghosts asleep."""
    found = []
    for count in (0, 2):
        ghosts = {"count": count, "background": False}
        found.append(PlainEngine(tiny_recipe(family, {"model": {"channel": {"ghosts": ghosts}}})))
    without, asleep = found
    for name, value in without.module.state_dict().items():
        part(asleep.module.state_dict()[name], value).copy_(value)
    return without, asleep


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The first entries, without the ghosts behind them: couplings have a row for each."""
    return whole[tuple(slice(length) for length in like.shape)]


@pytest.mark.usefixtures("poisoned_memory")
def test_ghosts_leave_the_first_weights_of_others_alone(tiny_recipe: Builder) -> None:
    weights = []
    for count in (0, 2):
        overlay = {"model": {"channel": {"ghosts": {"count": count}}}}
        weights.append(build_model(tiny_recipe("moe-ghost", overlay)).state_dict())
    without, asleep = weights
    assert all(torch.equal(part(asleep[name], value), value) for name, value in without.items())
    added = {name: value for name, value in asleep.items() if name not in without}
    drawn = [value for name, value in added.items() if not name.endswith(("_bias", "alpha_G"))]
    for place, value in enumerate(drawn):
        assert value.std() > 0
        for other in (*drawn[:place], *without.values()):
            assert value.shape != other.shape or not torch.equal(value, other)


@pytest.mark.parametrize(
    "family", ["moe-ghost", "moe-gnn", "moe-learned-hyperedges", "moe-cosine", "moe-linear"]
)
def test_asleep_ghosts_change_no_bit(tiny_recipe: Builder, family: str) -> None:
    without, asleep = twins(tiny_recipe, family)
    ghosts = {n: p.clone() for n, p in asleep.module.named_parameters() if "ghost" in n}
    ids_BT = random_batch(without.recipe, 4, 9)[0]
    for number in range(2):
        for mode in (True, False):
            left, right = (engine.module.train(mode)(ids_BT) for engine in (without, asleep))
            assert torch.equal(left.logits, right.logits)
            for mine, theirs in zip(left.routings, right.routings, strict=True):
                for field in ("gates_TK", "expert_ids_TK", "load_E", "mean_probs_E", "lse_T"):
                    assert torch.equal(getattr(mine, field), getattr(theirs, field)), field
        for engine in (without, asleep):
            engine.module.train()
            engine.train_step(number)
        trained = dict(asleep.module.named_parameters())
        for name, parameter in without.module.named_parameters():
            assert torch.equal(part(trained[name], parameter), parameter), name
        assert ghosts and all(torch.equal(trained[name], value) for name, value in ghosts.items())
    for router in asleep.module.routers():
        router.ghost_alpha_G[0] = 0.01
    assert not torch.equal(asleep.module(ids_BT).logits, without.module(ids_BT).logits)


def test_evaluation_changes_nothing(tiny_recipe: Builder, corpus, engine_with) -> None:
    config, prepared = corpus
    data = {"data": config.model_dump(mode="json")}
    engine = engine_with(count=3, background=True, ramp_steps=4)
    overlay = {**data, "model": engine.recipe.model.model_dump(mode="json")}
    overlay["training"] = engine.recipe.training.model_dump(mode="json")
    engine = PlainEngine(tiny_recipe("moe-ghost", overlay))
    keeper = keeper_of(engine)
    for step in range(3):
        take_step(keeper, step, 1.0, 0.4)
    assert engine.alphas() == [[0.5, 0.25, 0.0], [0.0] * 3]
    before = json.dumps(keeper.state_dict()), everything(engine.module)
    setting = Setting(16, 16, 8, prepared.end_of_text_id)
    assert evaluate(engine.module.eval(), prepared.split("valid"), setting) is not None
    assert json.dumps(keeper.state_dict()) == before[0]
    after = everything(engine.module)
    assert after.keys() == before[1].keys()
    assert all(torch.equal(after[name], value) for name, value in before[1].items())


def everything(model: LanguageModel) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def test_a_ramp_goes_on_from_a_checkpoint(engine_with) -> None:
    engine = engine_with(patience=2, ramp_steps=5, window=4)
    keeper, twin, resumed = keeper_of(engine), None, None
    saturations = [0.9] * 4 + [0.2] + [0.9] * 7, [0.4] * 3 + [0.9] * 9
    told: list[list[Awakening]] = [[], []]
    for step, found in enumerate(zip(*saturations, strict=True)):
        if step == 4:
            twin = copy.deepcopy(engine)
            resumed = keeper_of(twin)
            resumed.load_state_dict(json.loads(json.dumps(keeper.state_dict())))
            assert 0 < engine.alphas()[0][0] < 1
        told[0] += take_step(keeper, step, *found)
        if twin is not None and resumed is not None:
            told[1] += take_step(resumed, step, *found)
            assert twin.alphas() == engine.alphas() and twin.rates() == engine.rates()
            assert resumed.state_dict() == keeper.state_dict()
    assert 0 < len(told[1]) < len(told[0]) and told[0][-len(told[1]) :] == told[1]


def test_ghosts_awake_in_the_weights_of_another_run_stay_awake(engine_with) -> None:
    engine = engine_with(ramp_steps=4)
    engine.module.routers()[0].ghost_alpha_G[:2] = torch.tensor([1.0, 0.5])
    keeper, found = keeper_of(engine), []
    for step in range(3):
        events = take_step(keeper, step, float(step == 0), 0.0)
        found.append((engine.alphas()[0], [event.ghost for event in events]))
    assert found == [
        ([1.0, 0.5, 0.0], [2]),
        ([1.0, 0.75, 0.25], []),
        ([1.0, 1.0, 0.5], []),
    ]


def test_without_a_schedule_or_ghosts_nobody_keeps_them(tiny_recipe: Builder) -> None:
    for overlay in (
        {},
        {"model": {"channel": {"ghosts": {"count": 0}}}, "training": {"ghosts": {}}},
    ):
        recipe = tiny_recipe("moe-ghost", overlay)
        engine = SimpleNamespace(module=build_model(recipe))
        assert "ghosts" not in build_engine_controllers(recipe, engine, no_batch, untrained=False)


GHOSTS = (
    "model.channel.ghosts={count: 2, background: true}",
    "model.channel.compare_outputs=true",
    "model.channel.coupling={kind: gnn, rank: 4}",
    "training.ghosts={threshold: 0.0, patience: 1, every: 2, min_step: 6, ramp_steps: 4}",
)
"""Twelve steps: the first ghosts wake after the 6th, the next after the 8th, where a checkpoint is."""


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Callable[[int], Path]:
    """An uninterrupted run at a ZeRO stage."""
    done: dict[int, Path] = {}

    def at_stage(stage: int) -> Path:
        if stage not in done:
            run = tmp_path_factory.mktemp("ghosts") / "run"
            result = train("--recipe", tiny / "tiny.yaml", "--run", run, *GHOSTS, stage=stage)
            assert result.returncode == 0, result.stderr
            assert "ghost 0 of layer 1 wakes: saturation 0." in result.stderr
            done[stage] = run
        return done[stage]

    return at_stage


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_an_awakening_is_a_line_of_metrics(whole) -> None:
    run = whole(3)
    told = [(line["step"], line["ghost"]) for line in lines(run) if "ghost" in line]
    assert [(step, e["layer"], e["ghost"]) for step, e in told] == [
        (6, 0, 0),
        (6, 1, 0),
        (8, 0, 1),
        (8, 1, 1),
    ]
    for step, event in told:
        assert event["saturation"] == pytest.approx(mean_saturation(run, event["layer"], step))
    for layer in range(LAYERS):
        alphas = [line["facts"][f"layer{layer}/ghost_alpha"] for line in step_lines(run)]
        assert alphas == [0.0] * 6 + [0.25, 0.5, 1.0, 1.5, 1.75, 2.0]
    saved = load_file(run / "checkpoints" / "8" / "model.safetensors")
    alpha_G = saved["blocks.0.channel.moe.router.ghost_alpha_G"]
    assert torch.equal(alpha_G, torch.tensor([0.5, 0.0]))


def mean_saturation(run: Path, layer: int, steps: int) -> float:
    """Over the first steps, as the first process saw them; new ones weigh 2 / 101."""
    facts = [line["facts"] for line in step_lines(run)[:steps]]
    found = [f[f"layer{layer}/apartness"] * f[f"layer{layer}/unexplained"] for f in facts]
    assert 0 < min(found) < max(found) <= 1
    mean = found[0]
    for saturation in found[1:]:
        mean += 2 / 101 * (saturation - mean)
    return mean


@pytest.mark.slow
def test_two_processes_wake_ghosts_by_the_mean_of_both(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = (*GHOSTS, "training.steps=8", "evaluation.legacy_sra=false")
    result = launch(2, "--recipe", tiny / "tiny.yaml", "--run", run, *overrides, stage=2)
    assert result.returncode == 0, result.stderr
    told = [line["ghost"] for line in lines(run) if "ghost" in line]
    assert [(event["layer"], event["ghost"]) for event in told] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    for event in told[:2]:
        of_first = mean_saturation(run, event["layer"], 6)
        assert event["saturation"] == pytest.approx(of_first, rel=0.2)
        assert event["saturation"] != pytest.approx(of_first, rel=1e-4)


UNTIMED = ("time", "tokens_per_second", "mfu")


@pytest.mark.parametrize("stage", [0, 3])
def test_resumed_within_a_ramp_it_is_the_same_run(whole, tmp_path: Path, stage: int) -> None:
    run = tmp_path / "interrupted"
    shutil.copytree(whole(stage), run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "12")
    (run / "checkpoints" / "best").unlink()
    (run / "summary.json").unlink()
    (run / "checkpoints" / "latest").write_text("8")
    result = train("--resume", "--run", run, stage=stage)
    assert result.returncode == 0, result.stderr
    mine, theirs = ([without_times(line) for line in lines(r)] for r in (run, whole(stage)))
    assert mine == theirs
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, wanted = (load_file(r / "checkpoints" / "12" / name) for r in (run, whole(stage)))
        assert ours.keys() == wanted.keys()
        assert [path for path in wanted if not torch.equal(ours[path], wanted[path])] == []


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in UNTIMED}
