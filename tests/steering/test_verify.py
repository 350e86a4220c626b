"""Verification: neutral doses do nothing, responses equal sums by hand, slopes beside their null."""

import json

import numpy as np
import pytest
import torch

from sra_ds.config.steering import Scale, Steering, Suppress
from sra_ds.data.loader import IGNORED
from sra_ds.errors import DataError
from sra_ds.evaluation.text import open_text
from sra_ds.inference.load import load_run
from sra_ds.inference.steer import steered
from sra_ds.steering.effect import log_probs, neutral_batches
from sra_ds.steering.verify import (
    DOSES,
    Target,
    choose_targets,
    null_experts,
    respond,
    verify,
)

TARGETS = [Target(0, 1, [10, 20, 30], [11, 21, 31]), Target(1, 3, [40], [50])]


def test_a_dose_of_one_changes_nothing(traced):
    loaded, split, _ = traced
    batches = neutral_batches(loaded, split, 70)
    edit = Scale(layer=0, expert=1, by=1.0)
    neutral, response = respond(loaded.model, batches, TARGETS, [edit])
    assert (response.effect_WX == 0).all() and (np.abs(response.kl_W) < 1e-6).all()
    assert np.array_equal(response.nll_W, neutral.nll_W)


def test_effect_cost_and_divergence_by_hand(traced):
    loaded, split, _ = traced
    batches = neutral_batches(loaded, split, 70)
    edit = Suppress(layer=0, expert=1)
    _, response = respond(loaded.model, batches, TARGETS, [edit])
    assert response.tokens_W.sum() == 70
    window = 0
    for batch in batches:
        before = log_probs(loaded.model, batch).double()
        with steered(loaded.model, Steering(edits=(edit,))):
            after = log_probs(loaded.model, batch).double()
        for row in range(len(batch.ids_BT)):
            counted = batch.targets_BT[row] != IGNORED
            p, q = before[row][counted], after[row][counted]
            kl = (p.exp() * (p - q)).sum()
            assert response.kl_W[window] == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
            nll = -q[torch.arange(len(q)), batch.targets_BT[row][counted]].sum()
            assert response.nll_W[window] == pytest.approx(float(nll), rel=1e-5)
            for number, target in enumerate(TARGETS):
                change = {
                    name: (q[:, ids].exp().sum(-1) / p[:, ids].exp().sum(-1)).log().mean()
                    for name, ids in (("own", target.own_S), ("control", target.control_S))
                }
                expected = float(change["own"] - change["control"])
                assert response.effect_WX[window, number] == pytest.approx(expected, abs=1e-4)
            window += 1


def test_control_tokens_are_as_frequent_and_no_top_tokens(traced):
    _, _, trace = traced
    frequency_V = np.bincount(trace.tokens_N, minlength=trace.vocab_size)
    busiest = [(layer, int(load_E.argmax())) for layer, load_E in enumerate(trace.load_LE)]
    for target in choose_targets(trace, busiest):
        assert len(target.own_S) == len(target.control_S) == len(set(target.control_S))
        assert not set(target.own_S) & set(target.control_S)
        rank_V = np.argsort(np.argsort(-frequency_V, kind="stable"))
        distance_S = np.abs(rank_V[target.own_S] - rank_V[target.control_S])
        assert distance_S.max() <= 2 * len(target.own_S)  # as near as the top tokens leave room


def test_an_expert_without_tokens_is_refused(traced, monkeypatch):
    _, _, trace = traced
    monkeypatch.setattr("sra_ds.steering.verify.least_routes", lambda trace: 1000)
    with pytest.raises(DataError, match="expert 0:1 serves too few tokens"):
        choose_targets(trace, [(0, 1)])


def test_null_experts_are_those_of_nearest_load(traced):
    _, _, trace = traced
    load_E = trace.load_LE[1]
    expert = int(load_E.argmax())
    found = null_experts(trace, Target(1, expert, [1], [2]))
    distances = [abs(int(load_E[e]) - int(load_E[expert])) for e in found]
    assert expert not in found and distances == sorted(distances)


def test_verify_reports_every_dose_and_both_slopes(traced):
    loaded, split, trace = traced
    expert = int(trace.load_LE[0].argmax())
    (found,) = verify(loaded, trace, split, choose_targets(trace, [(0, expert)]), 70)
    names = [f"scale {c:g}" for c in DOSES] + ["suppress", "boost 1", "boost 2"]
    assert list(found["responses"]) == names
    one = found["responses"]["scale 1"]
    assert one["effect"] == 0 and one["perplexity_ratio"] == 1 and abs(one["kl"]) < 1e-7
    none, four = (found["responses"][name]["effect"] for name in ("scale 0", "scale 4"))
    assert found["suppression_slope"]["value"] == pytest.approx(-none, abs=1e-7)
    assert found["boost_slope"]["value"] == pytest.approx(four / 3, abs=1e-7)
    for slope in (found["suppression_slope"], found["boost_slope"]):
        assert 0.25 <= slope["p"] <= 1  # three null experts at most: 1/4 at best
        assert slope["low"] <= slope["value"] <= slope["high"]


def test_the_command_writes_what_it_found(make_run, call, tmp_path):
    run = make_run().path
    loaded = load_run(run)
    with open_text(loaded) as text, torch.no_grad():
        ids = torch.from_numpy(text.split.read(0, 256)).view(-1, 16)
        busiest = [int(routing.load_E.argmax()) for routing in loaded.model(ids).routings]
    options = ("--tokens", 40, "--trace-tokens", 300, "--out", tmp_path / "v.json")
    places = [f"{layer}:{expert}" for layer, expert in enumerate(busiest)]
    tree = call("steer", "--run", run, "--json", "verify", *places, *options).tree
    assert [row["expert"] for row in tree["verified"]] == busiest
    assert json.loads((tmp_path / "v.json").read_text())["verified"] == tree["verified"]
    shown = call("steer", "--run", run, "verify", places[0], *options).out
    assert "suppression_slope" in shown and "scale 0.25" in shown
    call("steer", "--run", run, "verify", "7:0").refused("no layer 7")
    call("steer", "--run", run, "verify", "0:44").refused("no expert 44")
    call("steer", "--run", run, "verify", "0:0", "--tokens", -3).refused("--tokens")
