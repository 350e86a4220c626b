"""Schedules are functions of the step, and only controllers apply them."""

import math

import pytest
import torch

from commands import RECIPE
from sra_ds.config.loading import merge, validate
from sra_ds.config.training import ScheduleConfig
from sra_ds.model.language_model import build_model
from sra_ds.training.controllers import build_controllers
from sra_ds.training.controllers.protocol import Seen
from sra_ds.training.controllers.schedules import current_top_k, interpolate, learning_rate


def recipe(**training):
    tree = merge(RECIPE, {"data": {"train": ["text.jsonl"]}, "training": training})
    return validate(tree)


def rates(kind, **fields):
    schedule = ScheduleConfig(kind=kind, warmup_steps=10, **fields)
    return [learning_rate(schedule, 2.0, step, 110) for step in range(110)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_to_the_peak(kind):
    values = rates(kind)
    assert values[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert values[10] == pytest.approx(2.0)


def test_shapes_after_warm_up():
    assert rates("cosine")[60] == pytest.approx(1.0)
    assert rates("cosine", final=0.1)[-1] == pytest.approx(
        2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    )
    assert rates("linear")[85] == pytest.approx(0.5)
    assert rates("wsd", decay=0.2)[89] == pytest.approx(2.0)
    assert rates("wsd", decay=0.2)[100] == pytest.approx(1.0)
    assert set(rates("constant")[10:]) == {2.0}


def test_top_k_steps_up_and_comes_back_from_a_checkpoint():
    asked = recipe(top_k_schedule=[[0.0, 1], [0.5, 2]])
    model = build_model(asked)
    controller = build_controllers(asked, model)["top_k"]
    seen = []
    for step in range(12):
        controller.on_step_start(step)
        seen.append(current_top_k(model))
    assert seen == [1] * 6 + [2] * 6
    other = build_model(asked)
    build_controllers(asked, other)["top_k"].load_state_dict({"top_k": 1})
    assert current_top_k(other) == 1


def test_selection_bias_moves_against_the_load():
    asked = recipe(selection_bias_rate=0.1)
    model = build_model(asked).eval()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    routings = model(ids).routings
    build_controllers(asked, model)["selection_bias"].on_step_end(0, Seen(routings))
    for router, routing in zip(model.routers(), routings, strict=True):
        expected = 0.1 * torch.sign(routing.load_E.mean() - routing.load_E)
        assert torch.equal(router.selection_bias_E, expected)


def test_interpolation_is_piecewise_linear():
    knots = [(0.0, 1.0), (0.5, 11.0)]
    assert [interpolate(knots, at) for at in (0.0, 0.25, 0.5, 0.9)] == [1.0, 6.0, 11.0, 11.0]
