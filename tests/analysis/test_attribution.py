"""Slopes of words in gates: equal to finite differences of real scalings, unit by unit."""

import json

import numpy as np
import pytest

from sra_ds.analysis.attribution import attribute, gate_factors, gate_slopes, steering_of
from sra_ds.analysis.effect import WordSets, neutral_batches, prompt_batches, read_words
from sra_ds.config.steering import Scale, Steering
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered

WORDS = WordSets([10, 20, 30], [11, 21])
STEP = 2e-4


@pytest.fixture(params=["moe-cosine", "moe-linear"])
def loaded(make_run, request):
    run = load_run(make_run(request.param).path)
    run.model.double()
    return run


def log_odds(model, batches, by, layer, expert):
    edit = Scale(layer=layer, expert=expert, by=by)
    with steered(model, Steering(edits=(edit,))):
        return read_words(model, batches, WORDS)["log_odds"]


def test_slopes_are_finite_differences(loaded):
    prompts = prompt_batches(loaded, ["one", "a longer text about this", "two words"])
    with open_text(loaded) as text:
        everywhere = neutral_batches(loaded, text.split, 70)
    for batches in (prompts, everywhere):
        slopes_BLE = gate_slopes(loaded.model, batches, WORDS)
        for layer, expert in np.ndindex(slopes_BLE.shape[1:]):
            at = {"layer": layer, "expert": expert}
            higher, lower = (log_odds(loaded.model, batches, 1 + s, **at) for s in (STEP, -STEP))
            expected_B = (higher - lower) / (2 * STEP)
            np.testing.assert_allclose(slopes_BLE[:, layer, expert], expected_B, atol=1e-5)
    assert np.abs(slopes_BLE).max() > 1e-4


def test_without_other_words_it_is_the_log_probability(loaded):
    batches = prompt_batches(loaded, ["one", "two"])
    slopes_BLE = gate_slopes(loaded.model, batches, WordSets([10], []))
    layer, expert = np.unravel_index(np.abs(slopes_BLE).sum(0).argmax(), slopes_BLE.shape[1:])
    shares = []
    for by in (1 + STEP, 1 - STEP):
        edit = Scale(layer=layer, expert=expert, by=by)
        with steered(loaded.model, Steering(edits=(edit,))):
            shares.append(read_words(loaded.model, batches, WordSets([10], []))["share"])
    expected_B = (np.log(shares[0]) - np.log(shares[1])) / (2 * STEP)
    np.testing.assert_allclose(slopes_BLE[:, layer, expert], expected_B, atol=1e-5)


def test_nothing_is_left_in_the_model(loaded):
    with pytest.raises(RuntimeError, match="stop"), gate_factors(loaded.model, 2):
        raise RuntimeError("stop")
    assert not any(router._forward_hooks for router in loaded.model.routers())
    gate_slopes(loaded.model, prompt_batches(loaded, ["one"]), WORDS)
    assert all(p.grad is None for p in loaded.model.parameters())


def test_experts_are_ranked_by_size_and_noise_is_not_significant():
    rng = np.random.default_rng(1)
    slopes_BLE = rng.normal(size=(40, 2, 8))
    slopes_BLE[:, 1, 3] -= 2.0
    rows = attribute(slopes_BLE)
    assert (rows[0]["layer"], rows[0]["expert"]) == (1, 3)
    assert rows[0]["slope"] == pytest.approx(slopes_BLE[:, 1, 3].mean())
    assert rows[0]["p"] == 1 / 1000 and rows[0]["low"] < rows[0]["slope"] < rows[0]["high"] < 0
    assert all(row["p_adjusted"] > 0.05 for row in rows[1:])
    sizes = [abs(row["slope"]) for row in rows]
    assert len(rows) == 16 and sizes == sorted(sizes, reverse=True)


def test_a_card_follows_the_slopes():
    rows = [
        {"layer": 0, "expert": 2, "slope": -0.4},
        {"layer": 1, "expert": 1, "slope": 0.2},
    ]
    assert [edit.by for edit in steering_of(rows, 0.5, "", "").edits] == [0.5, 1.25]
    assert [edit.by for edit in steering_of(rows, -2.0, "", "").edits] == [3.0, 0.0]
    still = [{"layer": 0, "expert": 0, "slope": 0.0}]
    assert steering_of(still, 1.0, "", "").edits[0].by == 1.0


def test_the_command(make_run, call, tmp_path):
    run, card = make_run().path, tmp_path / "card.json"
    command = ("steer", "--run", run, "attribute", "--words", "a", "--against", "b")
    command = (*command, "--tokens", 64)
    shown = call(*command, "--top", 3, "--out", card, "--strength", -0.5).out
    assert shown.count("(adjusted)") == 3
    edits = json.loads(card.read_text())["edits"]
    assert len(edits) == 3 and {edit["kind"] for edit in edits} == {"scale"}
    priced = call("steer", "--run", run, "--json", "effect", card, *command[4:]).tree
    assert priced["effect"]["log_odds"]["change"]["value"] < 0
    call(*command, "--top", 0, "--out", card).refused("--top")
    call(*command, "--strength", "nan", "--out", card).refused("--strength")
