"""What a run computes does not depend on the ZeRO stage, the processes or the micro-batch."""

import json
import sys

import pytest

from commands import ROOT, TRAIN, call, launch, losses, step_lines, train
from sra_ds.config import load_recipe
from sra_ds.model.flops import flops_per_token
from sra_ds.model.language_model import build_model

SGD = ("training.optimizer.kind=sgd", "training.optimizer.learning_rate=0.02", "training.steps=6")
SHORT = ("evaluation.every=0", "checkpoint.every=0")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_train_alike(finished, stage):
    assert losses(finished(stage)) == pytest.approx(losses(finished(0)), abs=2e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_tell_the_same_gradient_norm(finished, stage):
    """Before clipping; DeepSpeed tells none at stage 0."""
    norms = [[line["grad_norm"] for line in step_lines(finished(s))] for s in (0, stage)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and min(norms[0]) > 0


@pytest.mark.parametrize("stage", [0, 3])
def test_utilisation_counts_the_whole_model_with_the_k_of_the_step(finished, stage):
    """The peak is measured anew by every run, so that the ratio of two steps tells."""
    run = finished(stage)
    model = build_model(load_recipe(run / "recipe.yaml"), "meta")
    lines = step_lines(run)
    per_speed = [lines[at]["mfu"] / lines[at]["tokens_per_second"] for at in (0, -1)]
    one, two = (flops_per_token(model, 32, top_k) for top_k in (1, 2))
    assert [lines[at]["top_k"] for at in (0, -1)] == [1, 2] and one < two
    assert per_speed[0] / per_speed[1] == pytest.approx(one / two)


@pytest.fixture(scope="module")
def one_process(tiny):
    run = tiny / "one-process"
    assert train("--recipe", tiny / "tiny.yaml", "--run", run, *SGD, *SHORT).returncode == 0
    return run


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_equal_one_with_auxiliary_losses(tiny, one_process, tmp_path, stage):
    """SGD, since Adam hides gradients of the wrong scale; 1e-5 is float32 rounding over six steps."""
    run = tmp_path / "two"
    result = launch(2, "--recipe", tiny / "tiny.yaml", "--run", run, *SGD, *SHORT, stage=stage)
    assert result.returncode == 0, result.stderr
    assert losses(run) == pytest.approx(losses(one_process), abs=1e-5)
    ours, theirs = (
        json.loads((r / "summary.json").read_text())["validation"] for r in (run, one_process)
    )
    assert ours["tokens"] == theirs["tokens"]
    assert ours["nll_per_token"] == pytest.approx(theirs["nll_per_token"], abs=1e-5)


def test_accumulation_changes_nothing_but_per_batch_statistics(tiny, tmp_path):
    """Without balance loss, whose statistics are per micro-batch, four micro-batches equal one."""
    runs = []
    for micro in (8, 2):
        runs.append(tmp_path / f"micro{micro}")
        arguments = (*SGD, *SHORT, "losses.balance=none", f"training.micro_batch_size={micro}")
        result = train("--recipe", tiny / "tiny.yaml", "--run", runs[-1], *arguments)
        assert result.returncode == 0, result.stderr
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)


@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing_changes_no_loss(tiny, finished, tmp_path, stage):
    arguments = ("training.top_k_schedule=[[0,1],[0.5,2]]", "training.selection_bias_rate=0.01")
    run = tmp_path / "run"
    result = train(
        "--recipe",
        tiny / "tiny.yaml",
        "--run",
        run,
        *arguments,
        "training.activation_checkpointing=true",
        stage=stage,
    )
    assert result.returncode == 0, result.stderr
    assert losses(run) == pytest.approx(losses(finished(stage)), abs=2e-6)


def test_bf16_follows_fp32_at_stage_2(tiny, finished, tmp_path):
    run = tmp_path / "bf16"
    arguments = ("training.top_k_schedule=[[0,1],[0.5,2]]", "training.precision=bf16", *SHORT)
    result = train("--recipe", tiny / "tiny.yaml", "--run", run, *arguments, stage=2)
    assert result.returncode == 0, result.stderr
    assert losses(run) == pytest.approx(losses(finished(0)), abs=0.05)
    assert losses(run)[-1] < losses(run)[0]


def test_processes_agree_on_a_run_directory_of_their_own(tiny, tmp_path):
    result = launch(2, "--recipe", tiny / "tiny.yaml", *SGD, *SHORT, stage=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_offload_and_compilation_change_no_loss(tiny, finished, tmp_path):
    arguments = ("training.top_k_schedule=[[0,1],[0.5,2]]", "training.selection_bias_rate=0.01")
    offload = call(
        sys.executable, TRAIN, "--deepspeed", ROOT / "ds_configs" / "zero2_offload.json",
        "--recipe", tiny / "tiny.yaml", "--run", tmp_path / "offload", *arguments,
    )  # fmt: skip
    assert offload.returncode == 0, offload.stderr
    assert losses(tmp_path / "offload") == pytest.approx(losses(finished(2)), abs=2e-6)
    compiled = train(
        "--recipe", tiny / "tiny.yaml", "--run", tmp_path / "compiled", *arguments,
        "training.compile=true",
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(finished(0)), abs=1e-5)
