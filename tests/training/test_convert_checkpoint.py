"""Checkpoints written anew for another layout, or as one file of weights."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from commands import ROOT, call, step_lines, train
from sra_ds.inference.load import load_run
from sra_ds.storage import checkpoint
from sra_ds.storage.run_dir import open_run

CONVERT = ROOT / "tools" / "convert_checkpoint.py"


def convert(*arguments):
    return call(sys.executable, CONVERT, *arguments, "--json")


def test_resharding_there_and_back_loses_nothing_and_the_run_goes_on(
    finished, interrupted, tmp_path
):
    run, spread, back = interrupted(1), tmp_path / "spread", tmp_path / "back"
    result = convert("--run", run, "--out", spread, "--reshard", "ep=2,world=4,zero=2")
    assert result.returncode == 0, result.stderr
    manifest = checkpoint.verify(spread / "checkpoints" / "8")
    assert manifest["layout"] == {"world_size": 4, "zero_stage": 2, "expert_parallel_size": 2}
    held = [e["experts"] for e in manifest["files"].values() if "experts" in e]
    assert held == [{"first": 0, "count": 4}, {"first": 4, "count": 4}] * 2
    recipe = open_run(spread).recipe()
    assert recipe.parallel.expert_parallel_size == 2
    assert recipe.model.channel.backend == "deepspeed"
    result = convert("--run", spread, "--out", back, "--reshard", "ep=1,world=1,zero=1")
    assert result.returncode == 0, result.stderr
    for stem in ("model", "optimizer"):
        before = load_file(run / "checkpoints" / "8" / f"{stem}.safetensors")
        after = load_file(back / "checkpoints" / "8" / f"{stem}.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    result = train("--resume", "--run", back, stage=1)
    assert result.returncode == 0, result.stderr
    losses = {line["step"]: line["loss"] for line in step_lines(back)}
    expected = {line["step"]: line["loss"] for line in step_lines(finished(1))}
    assert losses == pytest.approx(expected, abs=1e-6)  # its experts run under DeepSpeed now


def test_consolidated_weights_are_one_plain_file(finished, tmp_path):
    source, spread, out = finished(1), tmp_path / "spread", tmp_path / "whole"
    assert (
        convert("--run", source, "--out", spread, "--reshard", "ep=4,world=4,zero=3").returncode
        == 0
    )
    result = convert("--run", spread, "--out", out, "--consolidate")
    assert result.returncode == 0, result.stderr
    weights = load_file(json.loads(result.stdout)["weights"])
    expected = load_run(source, "latest").model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    loaded = load_run(out)
    assert loaded.recipe.parallel.expert_parallel_size == 1
    assert loaded.trainer["step"] == 12
    result = train("--resume", "--run", out)
    assert result.returncode == 2 and "optimizer" in result.stderr


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("ep=3,world=3,zero=1", "8 experts"),
        ("ep=2,world=3,zero=1", "does not divide world"),
        ("ep=2,world=2,zero=4", "zero is 0 to 3"),
        ("experts=2", "ep=N,world=M"),
    ],
)
def test_impossible_layouts_are_one_line(finished, tmp_path, layout, says):
    result = convert("--run", finished(1), "--out", tmp_path / "out", "--reshard", layout)
    assert result.returncode == 2 and says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out" / "checkpoints").exists()
