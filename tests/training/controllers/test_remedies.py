"""Remedies: what they do to anchors and biases, when, and that they do it again the same way."""

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sra_ds.config import Recipe
from sra_ds.data.loader import Batch, random_batch
from sra_ds.errors import ConfigError
from sra_ds.model.language_model import build_model
from sra_ds.training.anchors import router_inputs
from sra_ds.training.controllers import build_engine_controllers
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.controllers.remedies import Intervention, Remedies
from sra_ds.training.engine import build_optimizer
from sra_ds.training.step import step_loss

Builder = Callable[..., Recipe]
DEAD = 3
"""The expert that gets no tokens."""


class PlainEngine(nn.Module):
    """A model and its optimizer behind the names of an engine at ZeRO stage 0."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.module = recipe, build_model(recipe)
        self.optimizer = build_optimizer(self.module, recipe)
        for router in self.module.routers():
            router.selection_bias_E[DEAD] = -1e4

    def zero_optimization_stage(self) -> int:
        return 0

    def forward(self, *batch: Any) -> Any:
        return self.module(*batch)

    def train_step(self, number: int) -> list[Any]:
        found = step_loss(self(*self.batch(number)), self.recipe.losses)
        found.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found.routings

    def batch(self, number: int) -> Batch:
        return random_batch(self.recipe, self.recipe.training.batch_size, number)

    def moments(self) -> list[Tensor]:
        states = [self.optimizer.state[router.anchors] for router in self.module.routers()]
        return [state[key] for state in states for key in ("exp_avg", "exp_avg_sq")]


def recipe_with(tiny_recipe: Builder, family: str = "moe-cosine", **remedies: Any) -> Recipe:
    """64 tokens a step."""
    return tiny_recipe(family, {"training": {"remedies": remedies}})


def remedies_of(engine: PlainEngine) -> Remedies:
    return Remedies(engine.recipe, engine, engine.batch)


def loads(*layers: list[float]) -> Seen:
    """Facts of a step, as far as remedies look at them; every layer with k = 2."""
    return Seen(
        [SimpleNamespace(load_E=torch.tensor(x), expert_ids_TK=torch.zeros(1, 2)) for x in layers]
    )


def test_a_dead_anchor_becomes_the_router_input_of_a_token_once_a_window(
    tiny_recipe: Builder,
) -> None:
    engine = PlainEngine(recipe_with(tiny_recipe, reseed_dead_anchors=True, window_tokens=128))
    remedies, done, states = remedies_of(engine), [], []
    for step in range(4):
        routings = engine.train_step(step)
        states.append(copy.deepcopy(engine))
        done.append(remedies.on_step_end(step, Seen(routings)))
    assert [[(i.kind, i.layer, i.experts, i.load) for i in found] for found in done] == [
        [],
        [("reseed_dead_anchors", layer, [DEAD], [0.0]) for layer in (0, 1)],
    ] * 2
    before = states[3]  # at the end of a window, before anything was done
    inputs = router_inputs(before.module.routers(), before, engine.batch(3))
    for number, (router, old) in enumerate(
        zip(engine.module.routers(), before.module.routers(), strict=True)
    ):
        units_TD = normalize(inputs[number], dim=-1)
        assert (units_TD - router.anchors[DEAD]).norm(dim=-1).min() < 1e-6
        assert torch.equal(router.anchors[:DEAD], old.anchors[:DEAD])
        told = done[3][number]
        for anchors_ED, value in ((old.anchors, told.before), (router.anchors, told.after)):
            mean = (units_TD @ normalize(anchors_ED[DEAD], dim=-1)).mean().item()
            assert value == [pytest.approx(mean, abs=1e-6)]
    for now, then in zip(engine.moments(), before.moments(), strict=True):
        assert (now[DEAD] == 0).all() and torch.equal(now[:DEAD], then[:DEAD]) and now[:DEAD].any()


def test_the_new_anchor_brings_its_expert_to_life(tiny_recipe: Builder) -> None:
    """Tokens lie to one side, as in a trained model, and an anchor on the other side."""
    engine = PlainEngine(recipe_with(tiny_recipe, reseed_dead_anchors=True, window_tokens=64))
    first = engine.module.routers()[0]
    first.selection_bias_E.zero_()
    with torch.no_grad():
        engine.module.blocks[0].channel_norm.bias.fill_(3.0)
        (x_TD,) = router_inputs([first], engine, engine.batch(0))
        first.anchors.copy_(normalize(x_TD, dim=-1)[:4])
        first.anchors[DEAD] *= -1
    routings = engine(*engine.batch(0)).routings
    assert routings[0].load_E[DEAD] == 0
    remedies_of(engine).on_step_end(0, Seen(routings))
    assert engine(*engine.batch(0)).routings[0].load_E[DEAD] > 0


def test_other_steps_take_other_tokens_and_the_same_step_the_same(tiny_recipe: Builder) -> None:
    recipe, found = recipe_with(tiny_recipe, reseed_dead_anchors=True, window_tokens=64), []
    for step in (5, 5, 6):
        engine = PlainEngine(recipe)
        remedies_of(engine).on_step_end(step, Seen(engine(*engine.batch(0)).routings))
        found.append(engine.module.routers()[1].anchors[DEAD])
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_the_floor_rises_by_steps_to_its_cap_for_starved_experts_only(tiny_recipe: Builder) -> None:
    floor = {"floor": 0.5, "step": 0.375, "cap": 1.0}
    engine = PlainEngine(recipe_with(tiny_recipe, raise_floor=floor, window_tokens=400))
    biases = [router.selection_bias_E for router in engine.module.routers()]
    for bias_E in biases:
        bias_E.zero_()
    remedies, told = remedies_of(engine), []
    for step in range(10):  # 200 tokens each: every second one ends a window
        found = remedies.on_step_end(step, loads([49.0, 50.0, 150.0, 151.0], [100.0] * 4))
        assert not found or step % 2
        told += found
    expected = [(0.0, 0.375), (0.375, 0.75), (0.75, 1.0)]
    assert told == [
        Intervention("raise_floor", 0, [0], [0.49], [before], [after]) for before, after in expected
    ]
    assert [bias_E.tolist() for bias_E in biases] == [[1.0, 0.0, 0.0, 0.0], [0.0] * 4]


def test_a_dead_expert_gets_a_new_anchor_before_a_larger_bias(tiny_recipe: Builder) -> None:
    recipe = recipe_with(tiny_recipe, reseed_dead_anchors=True, raise_floor={}, window_tokens=10)
    remedies = remedies_of(PlainEngine(recipe))
    found = remedies.on_step_end(0, loads([0.0, 3.0, 97.0, 100.0], [0.0, 100.0, 100.0, 100.0]))
    assert [(i.kind, i.layer, i.experts) for i in found] == [
        ("reseed_dead_anchors", 0, [0]),
        ("reseed_dead_anchors", 1, [0]),
        ("raise_floor", 0, [1]),
    ]


def test_a_window_goes_on_from_a_checkpoint(tiny_recipe: Builder) -> None:
    recipe = recipe_with(tiny_recipe, reseed_dead_anchors=True, window_tokens=192)
    engine = PlainEngine(recipe)
    remedies, twin, done = remedies_of(engine), None, []
    for step in range(3):
        routings = engine.train_step(step)
        if step == 2:
            twin = copy.deepcopy(engine)
            resumed = remedies_of(twin)
            resumed.load_state_dict(json.loads(json.dumps(remedies.state_dict())))
            done.append(resumed.on_step_end(step, Seen(routings)))
        done.append(remedies.on_step_end(step, Seen(routings)))
    assert twin is not None and done[:2] == [[], []] and done[2] == done[3] and done[2]
    for mine, theirs in zip(twin.module.routers(), engine.module.routers(), strict=True):
        assert torch.equal(mine.anchors, theirs.anchors)


def test_nothing_is_done_unless_asked_for(tiny_recipe: Builder) -> None:
    recipe = tiny_recipe()
    assert not recipe.training.remedies.active
    engine = SimpleNamespace(module=build_model(recipe))
    found = build_engine_controllers(
        recipe, engine, lambda step: random_batch(recipe, 1, step), untrained=True
    )
    assert found == {}


@pytest.mark.parametrize(
    ("family", "training", "message"),
    [
        ("moe-linear", {"remedies": {"reseed_dead_anchors": True}}, "anchors it can move"),
        ("dense", {"remedies": {"reseed_dead_anchors": True}}, "anchors it can move"),
        ("moe-hash", {"remedies": {"raise_floor": {}}}, "router with scores"),
        ("moe-cosine", {"remedies": {"window_tokens": 5}}, "window_tokens=5 has no effect"),
        (
            "moe-cosine",
            {"selection_bias_rate": 0.1, "remedies": {"raise_floor": {}}},
            "leave one of them out",
        ),
    ],
)
def test_a_remedy_without_effect_is_refused(
    tiny_recipe: Builder, family: str, training: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_recipe(family, {"training": training})
