"""`backend: auto` measures once, remembers, and takes the fastest."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from commands import train
from sra_ds import timing
from sra_ds.config import load_recipe
from sra_ds.ops.extension import use_kernels
from sra_ds.training.backend_choice import choose_backend

CPU = torch.device("cpu")
SMALL = ["model.width=32", "model.mixer.heads=2", "model.channel.experts=4"]


@pytest.mark.parametrize("fastest", ["local", "deepspeed"])
def test_the_fastest_is_taken_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastest: str
) -> None:
    calls = []

    def clock(work: partial[None]) -> float:
        layer = type(work.args[0]).__name__
        kind = {"LocalBackend": "local", "DeepSpeedBackend": "deepspeed"}[layer]
        calls.append(kind)
        return 1.0 if kind == fastest else 2.0

    monkeypatch.setattr(timing, "wall_clock", clock)
    recipe = load_recipe("quickstart", SMALL)
    choice = choose_backend(recipe, 64, CPU, torch.float32, tmp_path)
    assert choice.backend == fastest and choice.measured_now
    assert choice.milliseconds[fastest] == pytest.approx(1.0)
    rounds = len(calls)
    again = choose_backend(recipe, 64, CPU, torch.float32, tmp_path)
    assert again == choice._replace(measured_now=False) and len(calls) == rounds
    choose_backend(recipe, 128, CPU, torch.float32, tmp_path)
    assert len(calls) == 2 * rounds, "another number of tokens is another measurement"
    with use_kernels("reference"):
        assert choose_backend(recipe, 64, CPU, torch.float32, tmp_path).measured_now
    for file in tmp_path.glob("*.json"):
        file.write_text("{}")
    assert choose_backend(recipe, 64, CPU, torch.float32, tmp_path).measured_now


def test_it_really_runs_every_backend(tmp_path: Path) -> None:
    choice = choose_backend(load_recipe("quickstart", SMALL), 64, CPU, torch.float32, tmp_path)
    assert set(choice.milliseconds) == {"local", "deepspeed"}
    assert all(value > 0 for value in choice.milliseconds.values())
    assert "local" in choice.reason() and "deepspeed" in choice.reason()


def test_a_run_says_what_was_chosen_and_why(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = tmp_path / "run"
    asked = ["model.channel.backend=auto", "training.steps=1", "evaluation.legacy_sra=false"]
    result = train("--recipe", tiny / "tiny.yaml", "--run", run, *asked)
    assert result.returncode == 0, result.stderr
    assert "backend " in result.stderr and "measured now" in result.stderr
    reasons = json.loads((run / "environment.json").read_text())["reasons"]
    assert reasons["backend"].startswith("auto: local")
