"""Alarms against closed forms of the figures they go by; each is told of once when it begins and ends."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sra_ds.config import Recipe
from sra_ds.metrics import load_summary
from sra_ds.training.alarms import TELLING_TOKENS, Alarm, judge, rules
from sra_ds.training.logging import _flat

Builder = Callable[..., Recipe]


def rules_of(recipe: Recipe, top_k: int = 2, window_tokens: int = 0) -> list[Any]:
    return rules(recipe.model.channel, top_k, window_tokens)


def channel(experts: int, **router: Any) -> dict[str, Any]:
    return {"model": {"channel": {"experts": experts, "router": router or {"kind": "cosine"}}}}


def figures(load: list[float]) -> dict[str, float]:
    return load_summary(torch.tensor(load), sum(load) / 2)


@pytest.mark.parametrize("experts", [4, 8, 128])
def test_all_tokens_on_the_same_k_experts_is_a_collapse_and_an_even_load_is_none(
    tiny_recipe: Builder, experts: int
) -> None:
    found = rules_of(tiny_recipe("moe-cosine", channel(experts)))
    crowded = figures([500.0, 500.0] + [0.0] * (experts - 2))
    (alarm,) = judge([figures([9.0] * experts), crowded], found, ())
    assert (alarm.kind, alarm.layer, alarm.state) == ("collapse", 1, "begins")
    assert alarm.value == pytest.approx(2 / experts)
    assert alarm.threshold == pytest.approx((2 + 0.05 * (experts - 2)) / experts)
    assert "losses.balance.weight" in alarm.line() and "layer 1" in alarm.line()


def test_a_layer_that_uses_all_its_experts_for_every_token_cannot_collapse(
    tiny_recipe: Builder,
) -> None:
    found = rules_of(tiny_recipe("moe-cosine", channel(4)), top_k=4)
    assert judge([figures([10.0] * 4)], found, ()) == []
    assert "collapse" not in {rule.kind for rule in found}


def test_an_alarm_begins_once_and_ends_once_with_room_between(tiny_recipe: Builder) -> None:
    """128 experts, k = 2: from a twentieth of the way between 2 / 128 and 1 on, until a tenth."""
    found = rules_of(tiny_recipe("moe-cosine", channel(128)))
    begins, ends = (2 + 0.05 * 126) / 128, (2 + 0.1 * 126) / 128
    values = [0.9, begins, begins - 1e-9, begins + 1e-3, begins - 1e-3, ends - 1e-9, ends, 0.2]
    active: set[Any] = set()
    told: list[Alarm] = []
    for value in values:
        new = judge([{"effective_experts": value}], found, active)
        active ^= {alarm.key for alarm in new}
        told += new
    assert [(alarm.state, alarm.value) for alarm in told] == [
        ("begins", begins - 1e-9),
        ("ends", ends),
    ]
    assert told[1].line().startswith("collapse in layer 0 is over") and told[1].remedy is None


def test_dead_experts_count_once_the_window_can_tell_them_from_rare_ones(
    tiny_recipe: Builder,
) -> None:
    recipe, layers = tiny_recipe(), [{"dead_fraction": 0.5}, {"dead_fraction": 0.51}]
    assert math.exp(-TELLING_TOKENS * 1e-4) < 1e-4
    assert judge(layers, rules_of(recipe, window_tokens=TELLING_TOKENS - 1), ()) == []
    found = rules_of(recipe, window_tokens=TELLING_TOKENS)
    (alarm,) = judge(layers, found, ())
    assert (alarm.kind, alarm.layer, alarm.threshold) == ("dead_layer", 1, 0.5)
    assert "training.remedies.reseed_dead_anchors" in alarm.line()
    assert judge([{}, {"dead_fraction": 0.41}], found, {alarm.key}) == []
    (over,) = judge([{}, {"dead_fraction": 0.4}], found, {alarm.key})
    assert over.state == "ends"


@pytest.mark.parametrize(
    ("value", "threshold"),
    [(100.0, None), (101.0, 100.0), (0.3, None), (0.29, 0.3)],
)
def test_a_learned_temperature_has_bounds(
    tiny_recipe: Builder, value: float, threshold: float | None
) -> None:
    router = {"kind": "cosine", "initial_temperature": 3.0}
    found = judge(
        [{"temperature": value}], rules_of(tiny_recipe("moe-cosine", channel(4, **router))), ()
    )
    assert [alarm.threshold for alarm in found] == ([] if threshold is None else [threshold])
    assert {alarm.kind for alarm in found} <= {"saturated_temperature"}


@pytest.mark.parametrize("temperature", ["none", "fixed"])
def test_a_temperature_that_the_recipe_fixes_is_judged_by_the_gates_alone(
    tiny_recipe: Builder, temperature: str
) -> None:
    overlay = channel(4, kind="cosine", temperature=temperature)
    found = rules_of(tiny_recipe("moe-cosine", overlay))
    (alarm,) = judge([{"temperature": 1e6, "top_gate": 0.995}], found, ())
    assert (alarm.kind, alarm.figure) == ("saturated_temperature", "top_gate")
    assert judge([{"temperature": 1e6, "top_gate": 0.99}], found, ()) == []


def test_an_alarm_is_a_line_that_wandb_and_json_take(tiny_recipe: Builder) -> None:
    found = rules_of(tiny_recipe(), window_tokens=TELLING_TOKENS)
    (alarm,) = judge([{"dead_fraction": 0.75}], found, ())
    line = json.loads(json.dumps({"step": 7, "alarm": alarm._asdict()}))
    numbers = {"alarm/layer": 0, "alarm/value": 0.75, "alarm/threshold": 0.5}
    assert _flat(line) == {"step": 7, **numbers}


def test_a_hash_has_no_temperature(tiny_recipe: Builder) -> None:
    found = rules_of(tiny_recipe("moe-hash"))
    assert judge([{"top_gate": 1.0}], found, ()) == []
