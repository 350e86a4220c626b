"""Cards that change words most for a divergence: what is measured decides, not what slopes promise."""

import numpy as np
import pytest

from sra_ds.config.steering import Steering
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered
from sra_ds.steering import fit
from sra_ds.steering.attribution import attribute, gate_cost, gate_slopes
from sra_ds.steering.effect import WordSets, divergence, neutral_batches, read_words
from sra_ds.steering.fit import Walk, moved, scales

WORDS = WordSets([10, 20, 30], [11, 21])


@pytest.fixture(params=["moe-cosine", "moe-linear"])
def walk(make_run, request):
    loaded = load_run(make_run(request.param).path)
    loaded.model.double()
    with open_text(loaded) as text:
        batches = neutral_batches(loaded, text.split, 480)
    return Walk(loaded.model, batches, WORDS, batches)


@pytest.fixture
def rows(walk):
    slopes_BLE = gate_slopes(walk.model, walk.places, WORDS)
    return attribute(slopes_BLE, gate_cost(walk.model, walk.places))


def test_the_divergence_is_spent_where_it_changes_most():
    ones_P, slope_P, cost_P = np.ones(3), np.array([0.4, -0.2, 0.1]), np.array([0.4, 0.1, 0.1])

    def steps(divergence, sign=1):
        return moved(ones_P, sign * slope_P / cost_P, cost_P, divergence) - 1

    little = steps(0.01)
    assert little / little[0] == pytest.approx((slope_P / cost_P) / (slope_P / cost_P)[0])
    assert (cost_P * little**2).sum() / 2 == pytest.approx(0.01)
    assert steps(0.01, -1) == pytest.approx(-little)
    assert steps(50.0) == pytest.approx([1.0, -1.0, 1.0])
    more = steps(0.2)
    assert more[1] == -1 and 0 < more[2] < 1  # what one may not spend goes to the others
    assert (cost_P * more**2).sum() / 2 == pytest.approx(0.2)


def test_a_further_step_starts_where_the_last_one_ended():
    gates_P, cost_P = np.array([1.2, 0.5]), np.array([1.0, 2.0])
    spent = (cost_P * (gates_P - 1) ** 2).sum() / 2
    assert moved(gates_P, np.array([1.0, 1.0]), cost_P, spent) == pytest.approx(
        [1.7333, 1.0333], abs=1e-3
    )
    assert (moved(gates_P, np.zeros(2), cost_P, 1.0) == gates_P).all()


@pytest.mark.parametrize("lower", [False, True])
def test_a_card_does_what_it_says_for_the_divergence_that_was_asked_for(walk, rows, lower):
    found = walk.fit(rows, 0.002, lower)
    steering = Steering(edits=tuple(found.edits))
    assert found.divergence == pytest.approx(
        divergence(walk.model, steering, walk.sample), rel=1e-6
    )
    assert found.divergence == pytest.approx(0.002, rel=0.05)
    values = [read_words(walk.model, walk.places, WORDS)["log_odds"].mean()]
    with steered(walk.model, steering):
        values.append(read_words(walk.model, walk.places, WORDS)["log_odds"].mean())
    assert values == pytest.approx([found.before, found.after])
    assert (values[1] < values[0]) == lower
    all_at_once = scales(rows, moved(np.ones(len(rows)), slopes(rows, lower), costs(rows), 0.002))
    assert abs(values[1] - values[0]) > 0.5 * abs(walk.value(all_at_once) - values[0])


def slopes(rows, lower):
    return np.array([row["slope"] for row in rows]) / costs(rows) * (1 - 2 * lower)


def costs(rows):
    return np.array([row["cost"] for row in rows])


def test_at_the_limits_the_divergence_is_what_there_is(walk, rows):
    found = walk.fit(rows, 1e3)
    assert 0 < found.divergence < 1e3 and found.after > found.before


def test_where_words_turn_round_the_card_stays_before_it(walk, rows, monkeypatch):
    """Words that fall from the second step on: the card is that of the first."""
    doses = []

    def value(self, edits):
        doses.append(len(doses))
        return [0.0, 1.0, 0.5, -1.0, -2.0][doses[-1]]

    monkeypatch.setattr(Walk, "value", value)
    found = walk.fit(rows, 0.002)
    assert len(doses) == fit.STEPS + 1 and (found.before, found.after) == (0.0, 1.0)
    assert found.divergence == pytest.approx(0.002 / fit.STEPS**2, rel=0.05)
    doses.clear()
    monkeypatch.setattr(Walk, "value", lambda self, edits: -float(len(edits) > 0))
    assert walk.fit(rows, 0.002).edits == []


def test_nothing_significant_gives_no_edits(walk):
    nothing = attribute(np.zeros((8, 2, 4)), np.zeros((2, 4)))
    found = walk.fit(nothing, 0.01)
    assert found.edits == [] and found.after == found.before and found.divergence == 0
