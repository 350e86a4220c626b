"""Checkpoints are complete or absent, and a resumed run is the uninterrupted one."""

import json
import shutil
from contextlib import nullcontext

import pytest
from safetensors.torch import load_file

from commands import step_lines, train
from sra_ds.config import load_recipe
from sra_ds.errors import ConfigError
from sra_ds.training.resume import require_same_run

FACTS = ("step", "loss", "cross_entropy", "grad_norm", "learning_rate", "top_k")


def facts(run):
    return [[line[key] for key in FACTS] for line in step_lines(run)]


def weights(run, step):
    return load_file(run / "checkpoints" / str(step) / "model.safetensors")


def summary(run):
    return json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bit_for_bit(finished, interrupted, stage):
    run = interrupted(stage)
    result = train("--resume", "--run", run, stage=stage)
    assert result.returncode == 0, result.stderr
    assert facts(run) == facts(finished(stage))
    ours, theirs = weights(run, 12), weights(finished(stage), 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for part in ("experts", "validation", "tokens"):
        assert summary(run)[part] == summary(finished(stage))[part]


def test_resume_without_run_takes_the_newest_of_the_recipe(interrupted, tmp_path, tiny):
    (tmp_path / "runs").mkdir()
    shutil.move(interrupted(0), tmp_path / "runs" / "tiny-1")
    (tmp_path / "runs" / "foreign" / "checkpoints").mkdir(parents=True)
    result = train("--resume", "--recipe", tiny / "tiny.yaml", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "tiny-1" / "summary.json").is_file()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(finished, interrupted):
    run = interrupted(2)
    part = run / "checkpoints" / "8" / "optimizer.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    result = train("--resume", "--run", run, stage=2)
    assert result.returncode == 0, result.stderr
    assert "passing over a broken checkpoint" in result.stderr
    assert "resuming" in result.stderr and "at step 4" in result.stderr
    assert facts(run) == facts(finished(2))


@pytest.mark.parametrize(
    "override", ["model.layers=3", "training.batch_size=4", "training.selection_bias_rate=0.5"]
)
def test_an_override_that_makes_it_another_run_is_refused(interrupted, override):
    result = train("--resume", "--run", interrupted(0), override)
    assert result.returncode == 2
    assert override.split("=")[0] in result.stderr and "--init-from" in result.stderr


def test_the_micro_batch_may_change_unless_it_fills_batches_with_documents():
    for batching, same in (("windows", True), ("documents", False)):
        own = [f"training.batching={batching}", "training.batch_size=8"]
        before, now = (
            load_recipe("quickstart", [*own, f"training.micro_batch_size={size}"])
            for size in (4, 2)
        )
        with nullcontext() if same else pytest.raises(ConfigError, match="micro_batch_size=2"):
            require_same_run(before, now)


def test_a_finished_run_is_not_done_again(finished):
    run = finished(0)
    before = (run / "metrics.jsonl").read_bytes()
    result = train("--resume", "--run", run, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == summary(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_that_goes_on_and_fails_is_not_finished(finished, tmp_path):
    run = tmp_path / "extended"
    shutil.copytree(finished(0), run, symlinks=True)
    longer = ("training.steps=16", "training.optimizer.learning_rate=1e30")
    result = train("--resume", "--run", run, *longer)
    assert result.returncode == 1 and "at step 14" in result.stderr, result.stderr
    assert (run / "checkpoints" / "12").is_dir() and not (run / "summary.json").exists()


def test_the_best_is_among_evaluations_of_the_same_text(finished, tmp_path):
    """Ruined weights are no better than those before, unless those were scored on other text."""
    run, asked = tmp_path / "run", ("training.steps=13", "training.schedule.kind=constant")
    asked += ("training.optimizer.learning_rate=1.0",)
    for cap, best in ((), "4 8 12"), (("evaluation.max_tokens=40",), "13"):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished(0), run, symlinks=True)
        result = train("--resume", "--run", run, *asked, *cap)
        assert result.returncode == 0, result.stderr
        assert str(summary(run)["best"]["step"]) in best.split()
        assert (
            summary(run)["validation"]["nll_per_token"]
            > 2 * summary(finished(0))["best"]["nll_per_token"]
        )


def test_two_processes_do_not_train_in_one_run(tiny, tmp_path):
    from sra_ds.storage.run_dir import RunDir, claim

    run = RunDir(tmp_path / "run")
    with claim(run), pytest.raises(ConfigError, match="another process"), claim(run):
        pass
    assert not run.path.exists()  # nothing was written, so nothing is left


def test_pruning_keeps_what_latest_names(tmp_path):
    from sra_ds.storage.checkpoint import numbered, prune

    for step in (2, 4, 8):
        (tmp_path / str(step)).mkdir()
    (tmp_path / "6.partial").mkdir()
    prune(tmp_path, keep=1, newest=4)  # 8 was damaged, the run went on from an older one
    assert numbered(tmp_path) == [4]
    assert not list(tmp_path.glob("*.partial"))


def test_best_is_replaced_in_one_step(tmp_path):
    from sra_ds.storage.checkpoint import point_best_at

    for step in (5, 9):
        (tmp_path / f"best-{step}").mkdir()
        point_best_at(tmp_path / f"best-{step}")
        assert (tmp_path / "best").resolve().name == f"best-{step}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "best-9"]


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
        "--recipe",
        tiny / "tiny.yaml",
        "--run",
        run,
        "--init-from",
        source,
        "training.steps=4",
        "model.channel.top_k=1",
    )
    assert result.returncode == 0, result.stderr
    assert step_lines(run)[0]["step"] == 1
    assert {line["top_k"] for line in step_lines(run)} == {1}
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
    assert [name for name in names if not name.startswith("best-")] == ["6", "best", "latest"]
    assert (run / "checkpoints" / "best" / "model.safetensors").is_file()


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
