"""Other halting rules than the trained one: in evaluation, generation and the sweep over thresholds."""

import json

import pytest
import torch

from sra_ds.errors import ConfigError
from sra_ds.inference.halting import halted_by, read_halting
from sra_ds.inference.load import load_run
from sra_ds.metrics import halting_summary
from sra_ds.model.facts import Halting


def rules(model) -> list[tuple[str, float]]:
    return [(block.mixer.halting, block.mixer.threshold) for block in model.blocks]


def test_a_rule_holds_within_the_block_only(make_run) -> None:
    model = load_run(make_run("resonance").path).model
    with halted_by(model, None):
        assert rules(model) == [("soft", 0.5)] * 2
    with pytest.raises(RuntimeError), halted_by(model, "hard:0.25"):
        assert rules(model) == [("hard", 0.25)] * 2
        raise RuntimeError
    with halted_by(model, "hard"):
        assert rules(model) == [("hard", 0.5)] * 2
    assert rules(model) == [("soft", 0.5)] * 2


@pytest.mark.parametrize(
    "how", ["", "hart", "hard:", "hard:x", "hard:-1", "hard:1.5", "soft:nan", "soft:inf"]
)
def test_what_is_no_rule_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match="expected soft or hard"):
        read_halting(how)


def test_evaluation_and_generation_take_a_rule(make_run, call) -> None:
    run = make_run("resonance").path
    found = {
        how: call("evaluate", "--run", run, "--json", "--health-tokens", 0, *how).tree
        for how in ((), ("--halting", "hard:0"), ("--halting", "hard:1"))
    }
    assert found["--halting", "hard:0"]["iterations"] == {"mean": 3.0, "by_layer": [3.0, 3.0]}
    assert found["--halting", "hard:1"]["iterations"] == {"mean": 1.0, "by_layer": [1.0, 1.0]}
    assert 1 < found[()]["iterations"]["mean"] < 3
    assert len({tree["nll_per_token"] for tree in found.values()}) == 3
    prompt = ("generate", "--run", run, "--prompt", "a", "--json", "--max-tokens", 4)
    assert call(*prompt, "--halting", "hard:1").tree["tokens"] > 0
    call(*prompt, "--halting", "never").refused("expected soft or hard")


def test_a_model_that_does_not_iterate_has_no_rule(make_run, call) -> None:
    run = make_run("dense").path
    call("evaluate", "--run", run, "--halting", "hard").refused("does not iterate")
    call("analyze_halting", "--run", run).refused("does not iterate")
    assert "iterations" not in call("evaluate", "--run", run, "--json").tree


def test_the_sweep_scores_and_times_every_rule(make_run, call, tmp_path) -> None:
    run = make_run("resonance").path
    out = tmp_path / "sweep"
    options = ("--thresholds", "0,0.5,1", "--timed-tokens", 50, "--out", out)
    options = (*options, "--typed-tokens", 2000)
    found = call("analyze_halting", "--run", run, "--json", *options).tree
    assert json.loads((out / "halting.json").read_text()) == found
    assert (out / "halting.png").stat().st_size > 1000
    assert (out / "iterations_by_type.png").stat().st_size > 1000
    types = found["types"]
    assert types["classes"] and sum(own["tokens"] for own in types["classes"].values()) > 100
    assert types["all"]["iterations"] == pytest.approx(sum(types["by_layer"]) / 2, rel=1e-5)
    rows = found["rules"]
    assert [row["rule"] for row in rows] == ["soft", "hard:0", "hard:0.5", "hard:1"]
    assert rows[1]["iterations"] == 3 and rows[3]["iterations"] == 1
    assert 1 < rows[2]["iterations"] < 3
    for part in ("model", "mixers", "decoding"):
        assert rows[0][f"{part}_time_over_soft"] == 1 and rows[3][f"{part}_time_over_soft"] > 0
    assert rows[0]["decoded_tokens_per_second"] > 0
    scored = call("evaluate", "--run", run, "--halting", "hard:1", "--json").tree
    assert rows[3]["token_perplexity"] == pytest.approx(scored["token_perplexity"], rel=1e-6)
    call("analyze_halting", "--run", run, "--thresholds", "0.3;0.5").refused("numbers such as")
    call("analyze_halting", "--run", run, "--thresholds", "0.3,nan").refused("hard:nan")


def test_summary_of_iterations() -> None:
    nan = torch.nan
    entropy_IBT = torch.tensor([[[0.8, 0.2, nan]], [[0.4, nan, nan]], [[nan, nan, nan]]])
    found = halting_summary(*Halting(entropy_IBT, torch.tensor([[2.0, 1.0, nan]])))
    assert found["iterations"] == 1.5 and found["shares"] == [0.5, 0.5, 0.0]
    first, second, third = found["entropy"]
    assert first["mean"] == pytest.approx(0.5) and first["reached"] == 1
    assert (first["p10"], first["p90"]) == (pytest.approx(0.26), pytest.approx(0.74))
    assert second["mean"] == pytest.approx(0.4) and second["reached"] == 0.5
    assert third == {"mean": None, "p10": None, "p90": None, "reached": 0}
    nothing = halting_summary(torch.full((2, 1, 1), nan), torch.full((1, 1), nan))
    assert nothing["iterations"] is None
