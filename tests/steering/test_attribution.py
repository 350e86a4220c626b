"""Slopes of words in gates: equal to finite differences of real scalings, unit by unit."""

import json

import numpy as np
import pytest
import torch

from sra_ds.config.steering import Scale, Steering
from sra_ds.data.loader import IGNORED
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered
from sra_ds.steering.attribution import (
    attribute,
    gate_cost,
    gate_factors,
    gate_slopes,
)
from sra_ds.steering.effect import (
    WordSets,
    log_probs,
    neutral_batches,
    prompt_batches,
    read_words,
)

WORDS = WordSets([10, 20, 30], [11, 21])
STEP = 2e-4
SMALL = 2e-3


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


def test_slopes_where_gates_are_scaled_already(loaded):
    """Zero is a place like any other: a gate that is off has a slope, too."""
    with open_text(loaded) as text:
        batches = neutral_batches(loaded, text.split, 140)
    gates_LE = np.array([[1.5, 2.0, 0.25, 0.5], [0.0, 0.0, 0.0, 0.0]])
    slopes_LE = gate_slopes(loaded.model, batches, WORDS, gates_LE).mean(0)

    def value(layer, expert, by):
        edits = [
            Scale(layer=at[0], expert=at[1], by=by if at == (layer, expert) else gates_LE[at])
            for at in np.ndindex(gates_LE.shape)
        ]
        with steered(loaded.model, Steering(edits=tuple(edits))):
            return read_words(loaded.model, batches, WORDS)["log_odds"].mean()

    for layer, expert in np.ndindex(gates_LE.shape):
        here = gates_LE[layer, expert]
        ends = [value(layer, expert, by) for by in (max(here - STEP, 0), here + STEP)]
        expected = (ends[1] - ends[0]) / (STEP if here == 0 else 2 * STEP)
        assert slopes_LE[layer, expert] == pytest.approx(expected, abs=1e-4)
    assert np.abs(slopes_LE[gates_LE == 0]).max() > 1e-4


def test_without_other_words_it_is_the_slope_of_their_share(loaded):
    batches = prompt_batches(loaded, ["one", "two"])
    slopes_BLE = gate_slopes(loaded.model, batches, WordSets([10], []))
    layer, expert = np.unravel_index(np.abs(slopes_BLE).sum(0).argmax(), slopes_BLE.shape[1:])
    shares = []
    for by in (1 + STEP, 1 - STEP):
        edit = Scale(layer=layer, expert=expert, by=by)
        with steered(loaded.model, Steering(edits=(edit,))):
            shares.append(read_words(loaded.model, batches, WordSets([10], []))["share"])
    expected_B = (shares[0] - shares[1]) / (2 * STEP)
    np.testing.assert_allclose(slopes_BLE[:, layer, expert], expected_B, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_slopes_and_costs_of_a_gpu(loaded):
    loaded.model.float()
    batches = prompt_batches(loaded, ["one", "two words"])
    here = gate_slopes(loaded.model, batches, WORDS), gate_cost(loaded.model, batches)
    loaded.model.to("cuda")
    there = gate_slopes(loaded.model, batches, WORDS), gate_cost(loaded.model, batches)
    for own, other in zip(here, there, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-3, rtol=1e-2)


def test_nothing_is_left_in_the_model(loaded):
    with pytest.raises(RuntimeError, match="stop"), gate_factors(loaded.model, 2):
        raise RuntimeError("stop")
    assert not any(router._forward_hooks for router in loaded.model.routers())
    gate_slopes(loaded.model, prompt_batches(loaded, ["one"]), WORDS)
    assert all(p.grad is None for p in loaded.model.parameters())


def test_the_cost_is_the_divergence_of_a_small_change(loaded):
    """KL = F d^2 / 2 for one gate; of the last layer, since no decision behind it can flip."""
    with open_text(loaded) as text:
        batches = neutral_batches(loaded, text.split, 320)
    many = np.mean([gate_cost(loaded.model, batches, seed) for seed in range(40)], 0)
    before = [log_probs(loaded.model, batch) for batch in batches]
    layer = 1
    for expert in np.argsort(-many[layer])[:2]:
        edit = Scale(layer=layer, expert=expert, by=1 + SMALL)
        total = tokens = 0.0
        with steered(loaded.model, Steering(edits=(edit,))):
            for batch, was in zip(batches, before, strict=True):
                kl_BT = (was.exp() * (was - log_probs(loaded.model, batch))).sum(-1)
                counted_BT = batch.targets_BT != IGNORED
                total += float(kl_BT[counted_BT].sum())
                tokens += int(counted_BT.sum())
        assert many[layer, expert] * SMALL**2 / 2 == pytest.approx(total / tokens, rel=0.2)


def test_experts_are_ranked_by_gain_and_noise_is_not_significant():
    rng = np.random.default_rng(1)
    slopes_BLE = rng.normal(size=(40, 2, 8))
    slopes_BLE[:, 1, 3] -= 2.0
    rows = attribute(slopes_BLE, np.ones((2, 8)))
    assert (rows[0]["layer"], rows[0]["expert"]) == (1, 3)
    assert rows[0]["slope"] == pytest.approx(slopes_BLE[:, 1, 3].mean())
    assert rows[0]["gain"] == pytest.approx(-rows[0]["slope"] / np.sqrt(1.1))
    assert rows[0]["p"] == 1 / 1000 and rows[0]["low"] < rows[0]["slope"] < rows[0]["high"] < 0
    assert all(row["p_adjusted"] > 0.05 for row in rows[1:])
    gains = [row["gain"] for row in rows]
    assert len(rows) == 16 and gains == sorted(gains, reverse=True)


def test_one_slope_among_many_is_not_lost_by_adjusting():
    slopes_BLE = np.random.default_rng(3).normal(size=(40, 4, 64))
    slopes_BLE[:, 2, 5] += 2.0
    first, *others = attribute(slopes_BLE, np.ones((4, 64)))
    assert (first["layer"], first["expert"]) == (2, 5) and first["p_adjusted"] < 0.05
    assert all(row["p_adjusted"] > 0.05 for row in others)


def test_the_command(make_run, call, tmp_path):
    run, card = make_run().path, tmp_path / "card.json"
    words = ("--words", "/^.?a$/", "--against", "b", "--tokens", 480)
    command = ("steer", "--run", run, "attribute", *words)
    shown = call(*command, "--top", 3, "--out", card, "--lower").out
    assert shown.count("(adjusted)") == 3
    edits = json.loads(card.read_text())["edits"]
    assert edits and {edit["kind"] for edit in edits} == {"scale"}
    priced = call("steer", "--run", run, "effect", card, *words, "--json")
    assert priced.tree["effect"]["log_odds"]["change"]["value"] < 0
    assert "found on validation split" in priced.err and "is measured there, too" in priced.err
    evaluate = ("evaluate", "--run", run, "--steer", card, "--health-tokens", 0)
    assert "is measured there, too" in call(*evaluate).err
    assert "is measured there, too" not in call(*evaluate, "--split", "test").err
    prompts = tmp_path / "prompts"
    prompts.write_text("\n".join(f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"))
    assert call(*command, "--prompts", prompts, "--out", card).code == 0
    found_on = json.loads(card.read_text())["description"]
    assert found_on.startswith("found on validation split (") and " and prompts (" in found_on
    few = call(*command[:-1], 64, "--out", tmp_path / "no.json")
    assert few.code == 2 and "nothing for a card to scale" in few.err
    assert not (tmp_path / "no.json").exists()
    call(*command, "--lower").refused("--lower has an effect only with --out")
    call(*command, "--divergence", "nan", "--out", card).refused("--divergence must be above 0")
    call(*command[:4], "--words", "/(/").refused("/(/ is no regular expression")
    call(*command[:4], "--words", "/xyzzy/").refused("found in no token")
