"""Conversions: complete or absent, of the checkpoint that was asked for, and no option without effect."""

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from commands import ROOT
from saved_runs import Result
from sra_ds.config import Recipe
from sra_ds.errors import CheckpointError, ConfigError
from sra_ds.model.language_model import build_model
from sra_ds.storage import checkpoint, convert
from sra_ds.storage.checkpoint import OPTIMIZER, WEIGHTS, Contents, Layout
from sra_ds.storage.fragments import whole_tensor
from sra_ds.storage.run_dir import RunDir, complete_or_absent

LAYOUT = "ep=2,world=2,zero=1"


Convert = Callable[..., Result]


@pytest.fixture(scope="session")
def tool() -> ModuleType:
    """tools/convert_checkpoint.py, which is no module of the package."""
    path = ROOT / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Convert:
    """Run the tool in this process."""

    def act(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        try:
            code = tool.main()
        except SystemExit as error:
            code = error.code
        return Result(code, *capfd.readouterr())

    return act


@pytest.fixture
def run(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    """A run of steps 10 and 20, of which 10 was the best."""
    recipe, run = tiny_recipe(), RunDir(tmp_path / "run")
    run.write_start(recipe, {}, {})
    run.tokenizer_file.write_text("{}")
    state = build_model(recipe).state_dict()
    for name in ("10", "20", "best-10"):
        step = int(name.removeprefix("best-"))
        tensors = {WEIGHTS: {n: whole_tensor(t + step) for n, t in state.items()}}
        if name.isdigit():
            means = {f"{n}/exp_avg": whole_tensor(t / 2) for n, t in state.items()}
            counts = {f"{n}/step": whole_tensor(torch.tensor(float(step))) for n in state}
            tensors[OPTIMIZER] = {**means, **counts}
        contents = Contents(tensors, {"step": step, "top_k": 2}, {"step": step})
        checkpoint.save_parts(run.checkpoints / name, [contents], Layout())
    checkpoint.point_latest_at(run.checkpoints / "20")
    checkpoint.point_best_at(run.checkpoints / "best-10")
    return run


def spoil(run: RunDir, step: int) -> Path:
    path = run.checkpoints / str(step) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return path


def refused(result: Result, *words: str) -> None:
    assert result.code == 2 and len(result.err.splitlines()) == 1, result
    assert all(word in result.err for word in words), result.err


def beside(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.path.parent.iterdir())


def test_the_step_taken_and_why_are_told(call: Convert, run: RunDir, tmp_path: Path) -> None:
    steps = {
        ("--reshard", LAYOUT): ("20", "the newest complete"),
        ("--consolidate",): ("10", "the best on validation"),
        ("--consolidate", "--checkpoint", "latest"): ("20", "the newest complete"),
        ("--consolidate", "--checkpoint", "20"): ("20", "the step asked for"),
        ("--reshard", LAYOUT, "--checkpoint", "10"): ("10", "the step asked for"),
    }
    for number, (asked, (step, reason)) in enumerate(steps.items()):
        out = tmp_path / f"json{number}"
        tree = call("--run", run.path, "--out", out, *asked, "--json").tree
        assert (tree["checkpoint"], tree["chosen"]) == (step, reason)
        assert tree["run"] == str(out) and Path(tree.get("weights", out)).exists()
        assert [path.name for path in (out / "checkpoints").iterdir() if path.is_dir()] == [step]
        assert (out / "checkpoints" / "latest").read_text() == step
        checkpoint.verify(out / "checkpoints" / step)
        shown = call("--run", run.path, "--out", tmp_path / f"text{number}", *asked).out
        assert step in shown and reason in shown
    explained = " ".join(call("--help").out.split())
    assert "Takes the newest complete checkpoint" in explained
    assert "Takes the best checkpoint on validation, or the newest complete" in explained


@pytest.mark.parametrize("asked", [["--reshard", LAYOUT], ["--consolidate"]])
def test_damaged_checkpoints_are_passed_over_aloud(
    call: Convert, run: RunDir, tmp_path: Path, asked: list[str]
) -> None:
    (run.checkpoints / "best").unlink()
    path = spoil(run, 20)
    for more in ((), ("--json",)):
        result = call("--run", run.path, "--out", tmp_path / f"out{len(more)}", *asked, *more)
        assert result.code == 0
        assert f"passed over a broken checkpoint: {path} is damaged" in result.err
    assert result.tree["checkpoint"] == "10"
    assert len(result.tree["passed_over"]) == 1 and str(path) in result.tree["passed_over"][0]


def test_a_step_that_was_asked_for_is_taken_or_refused(
    call: Convert, run: RunDir, tmp_path: Path
) -> None:
    path = spoil(run, 10)
    asked = ("--run", run.path, "--out", tmp_path / "out", "--reshard", LAYOUT, "--checkpoint")
    refused(call(*asked, "10"), f"{path} is damaged")
    refused(call(*asked, "15"), "does not exist; steps kept: 10, 20")
    refused(call(*asked, "best"), "no optimizer state", "latest or a step")
    assert beside(run) == ["run"]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (["--run", "RUN", "--consolidate", "training.steps=5"], "training.steps=5"),
        (["--run", "RUN", "--reshard", LAYOUT, "--recipe", "sra-8b"], "--recipe"),
        (["--run", "RUN", "training.steps=5", "--reshard", LAYOUT], "training.steps=5"),
        (["--run", "RUN", "--consolidate", "--tokenizer", "t.json"], "--tokenizer"),
        (["--import-sra", "x.pt", "--run", "RUN"], "--run"),
        (["--import-sra", "x.pt", "--checkpoint", "10"], "--checkpoint"),
    ],
)
def test_an_option_without_effect_is_refused(
    call: Convert, run: RunDir, tmp_path: Path, asked: list[str], named: str
) -> None:
    words = [str(run.path) if word == "RUN" else word for word in asked]
    result = call("--out", tmp_path / "out", *words)
    refused(result, f"error: {named} has an effect only with --", "leave it out")
    assert beside(run) == ["run"]


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ("", "--reshard : expected ep=N,world=M"),
        ("ep=2,ep=4,world=4", "ep is given twice"),
        ("ep=2", "ep=2 does not divide world=1; add world=N, a multiple of 2"),
        ("ep=2,world=3", "ep=2 does not divide world=3; change world=N, a multiple of 2"),
        ("world=100000", "world is at most 4096"),
        ("world=4097", "world is at most 4096"),
        ("world=" + 5000 * "9", "expected ep=N,world=M"),
        ("world=0", "at least 1"),
        ("zero=4", "zero is 0 to 3"),
        ("ep=3,world=3", "ep=3 does not divide the model's 4 experts"),
    ],
)
def test_impossible_layouts_are_one_line(
    call: Convert, run: RunDir, tmp_path: Path, layout: str, says: str
) -> None:
    refused(call("--run", run.path, "--out", tmp_path / "out", "--reshard", layout), says)
    assert beside(run) == ["run"]
    assert convert.parse_layout("world=4096") == Layout(4096)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("target", ["point_latest_at", "_complete"])
def test_what_fails_leaves_nothing_behind(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, failure: Any, target: str
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(checkpoint, target, fail)
    out = RunDir(run.path.with_name("out"))
    for act in (
        lambda: convert.reshard(run, out, Layout(2)),
        lambda: convert.consolidate(run, out),
    ):
        with pytest.raises((KeyboardInterrupt, OSError)):
            act()
        assert beside(run) == ["run"]


def test_what_a_kill_left_is_no_obstacle(call: Convert, run: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    child = os.fork()
    if child == 0:
        try:
            with complete_or_absent(RunDir(out)) as new:
                (new.checkpoints / "30").mkdir(parents=True)
                (new.path / "summary.json").write_text("{}")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # not the tests once more
    os.waitpid(child, 0)
    assert [path.name for path in out.parent.iterdir()] == ["out.partial"]
    result = call("--run", run.path, "--out", out, "--reshard", LAYOUT, "--json")
    assert result.tree["checkpoint"] == "20"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    left = {path.name for path in out.iterdir()}
    assert left == {"checkpoints", "environment.json", "recipe.yaml", "tokenizer.json"}
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"20", "latest"}


def test_two_do_not_write_the_same_output(tmp_path: Path) -> None:
    out = RunDir(tmp_path / "out")
    with complete_or_absent(out) as first:
        first.summary_file.write_text("{}")
        with (
            pytest.raises(ConfigError, match=r"another process is writing it; .*--out"),
            complete_or_absent(out),
        ):
            raise AssertionError("both write")
    assert out.summary_file.read_text() == "{}"


def test_nobodys_files_are_deleted(call: Convert, run: RunDir, tmp_path: Path) -> None:
    """Neither a folder that happens to have the name, nor the run that is read."""
    mine = tmp_path / "out.partial" / "mine"
    mine.parent.mkdir()
    mine.write_text("")
    result = call("--run", run.path, "--out", tmp_path / "out", "--consolidate")
    refused(result, str(mine.parent), "in the way", "--out")
    assert mine.exists()
    partial = run.path.rename(tmp_path / "run.partial")
    refused(call("--run", partial, "--out", tmp_path / "run", "--consolidate"), "in the way")
    assert (partial / "recipe.yaml").exists()


def test_a_taken_output_is_refused_in_its_own_words(
    call: Convert, run: RunDir, tmp_path: Path
) -> None:
    for taken in (run.path, run.recipe_file):
        for asked in (["--consolidate"], ["--reshard", LAYOUT]):
            result = call("--run", run.path, "--out", taken, *asked)
            refused(result, f"{taken} exists already; choose another --out")
            assert "--resume" not in result.err
    (tmp_path / "empty").mkdir()
    assert call("--run", run.path, "--out", tmp_path / "empty", "--consolidate").code == 0


def test_a_consolidated_run_says_what_to_do_instead(
    call: Convert, run: RunDir, tmp_path: Path
) -> None:
    assert call("--run", run.path, "--out", tmp_path / "whole", "--consolidate").code == 0
    result = call("--run", tmp_path / "whole", "--out", tmp_path / "out", "--reshard", LAYOUT)
    refused(result, "no optimizer files", "--init-from", "--reshard instead of --consolidate")
    assert beside(run) == ["run", "whole"]


def test_a_checkpoint_of_another_model_is_not_resharded(run: RunDir, tmp_path: Path) -> None:
    text = run.recipe_file.read_text()
    for own, other in {"width: 32": "width: 64", "layers: 2": "layers: 3"}.items():
        assert own in text
        run.recipe_file.write_text(text.replace(own, other))
        with pytest.raises(CheckpointError, match="is not of the recipe beside it"):
            convert.reshard(run, RunDir(tmp_path / "out"), Layout())
        assert beside(run) == ["run"]
