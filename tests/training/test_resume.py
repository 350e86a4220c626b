"""Checkpoints are complete or absent, and a resumed run is the uninterrupted one."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from commands import step_lines, train

FACTS = ("step", "loss", "cross_entropy", "grad_norm", "learning_rate", "top_k")


def facts(run):
    return [[line[key] for key in FACTS] for line in step_lines(run)]


def weights(run, step):
    return load_file(run / "checkpoints" / str(step) / "model.safetensors")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_for_bit(finished, interrupted, stage):
    run = interrupted(stage)
    result = train("--resume", "--run", run, stage=stage)
    assert result.returncode == 0, result.stderr
    assert facts(run) == facts(finished(stage))
    ours, theirs = weights(run, 12), weights(finished(stage), 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_resume_without_run_takes_the_newest_of_the_recipe(interrupted, tmp_path, tiny):
    (tmp_path / "runs").mkdir()
    shutil.move(interrupted(0), tmp_path / "runs" / "tiny-1")
    result = train("--resume", "--recipe", tiny / "tiny.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "tiny-1" / "summary.json").is_file()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(finished, interrupted):
    run = interrupted(2)
    damaged = run / "checkpoints" / "8" / "deepspeed"
    part = next(damaged.glob("*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:-1])
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    assert "passing over a broken checkpoint" in result.stderr
    assert "resuming" in result.stderr and "at step 4" in result.stderr
    assert facts(run) == facts(finished(2))


def test_another_layout_is_refused(interrupted):
    result = train("--resume", "--run", interrupted(2), stage=1)
    assert result.returncode == 2
    assert "ZeRO stage 2" in result.stderr and "--init-from" in result.stderr


def test_another_corpus_is_refused(interrupted):
    run = interrupted(0)
    environment = json.loads((run / "environment.json").read_text())
    environment["corpus_fingerprint"] = "0" * 64
    (run / "environment.json").write_text(json.dumps(environment))
    result = train("--resume", "--run", run)
    assert result.returncode == 2
    assert "is not the corpus of" in result.stderr


def test_init_from_starts_anew_from_weights(finished, tiny, tmp_path):
    source = finished(0)
    run = tmp_path / "next"
    result = train(
        "--recipe", tiny / "tiny.yaml", "--run", run, "--init-from", source, "training.steps=4"
    )
    assert result.returncode == 0, result.stderr
    assert step_lines(run)[0]["step"] == 1
    assert step_lines(run)[0]["cross_entropy"] < step_lines(source)[0]["cross_entropy"] - 0.1


def test_a_run_is_never_overwritten(finished, tiny):
    result = train("--recipe", tiny / "tiny.yaml", "--run", finished(0))
    assert result.returncode == 2
    assert "already holds a run" in result.stderr


def test_only_the_newest_checkpoints_are_kept(tiny, tmp_path):
    run = tmp_path / "run"
    arguments = ("checkpoint.keep=1", "checkpoint.every=2", "training.steps=6")
    assert train("--recipe", tiny / "tiny.yaml", "--run", run, *arguments).returncode == 0
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["6", "best", "latest"]


def test_a_run_that_diverges_names_step_and_part_and_keeps_its_checkpoints(tiny, tmp_path):
    run = tmp_path / "run"
    result = train(
        "--recipe",
        tiny / "tiny.yaml",
        "--run",
        run,
        "training.optimizer.learning_rate=1e30",
        "training.schedule.warmup_steps=0",
        "training.gradient_clipping=0",
        "checkpoint.every=1",
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "at step 2, first in layer 0" in result.stderr
    assert (run / "checkpoints" / "latest").read_text() == "1"
