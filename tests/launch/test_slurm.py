"""The sbatch scripts under a stub slurm: train, be told to stop, queue again, resume bit for bit."""

import json
import os
import signal
import sys
import time

import pytest

from commands import ROOT, losses, step_lines

TASK = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
         "MASTER_PORT", "OMP_NUM_THREADS")
known = {{name: os.environ.get(name) for name in names}}
known["arguments"] = sys.argv[1:]
handlers = {{signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}}
known["ignores"] = handlers == {{signal.SIG_IGN}}
folder = pathlib.Path(os.environ["STUB_FOLDER"])
(folder / f"rank{{os.environ['RANK']}}.json").write_text(json.dumps(known))
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
if os.environ["RANK"] == "0":
    for what in os.environ["DOES"].split():
        if what == "save":
            (run / "checkpoints" / "8").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "8" / "manifest.json").touch()
            (run / "checkpoints" / "latest").write_text("8")
        elif what == "finish":
            time.sleep(0.05)
            (run / "summary.json").write_text("{{}}")
        elif what == "wait":
            signal.signal(signal.SIGTERM, lambda *_: None)
            (folder / "waits").touch()
            signal.pause()
        else:
            sys.exit(int(what))
"""


@pytest.fixture
def job(slurm, tmp_path):
    """`job(does, ...)` runs a script with a task that only does that, in place of training."""
    task = slurm.folder / "task"
    task.write_text(TASK)
    task.chmod(0o755)

    def start(does, script="one_node.sbatch", *overrides, **variables):
        variables = {"PYTHON": task, "DOES": does, "RUN": tmp_path / "run"} | variables
        return slurm.start(script, *overrides, **variables)

    return start


def tasks(slurm):
    """What each task of the last job was given, by rank."""
    files = slurm.folder.glob("rank*.json")
    return {int(path.stem[4:]): json.loads(path.read_text()) for path in files}


def test_a_preempted_run_goes_on_with_the_same_samples(
    slurm, tiny, tmp_path, sixty_steps, undisturbed
):
    run = tmp_path / "run"
    variables = {"RECIPE": tiny / "tiny.yaml", "RUN": run}
    job = slurm.start("one_node.sbatch", *sixty_steps, **variables)
    while not (run / "metrics.jsonl").exists() or len(step_lines(run)) < 5:
        assert job.poll() is None, slurm.log.read_text()
        time.sleep(0.02)
    slurm.signal_tasks(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0, slurm.log.read_text()
    stopped = json.loads((run / "checkpoints" / "latest").read_text())
    assert 5 <= stopped < 60
    assert f"stopped by SIGUSR1 after step {stopped}" in slurm.log.read_text()
    assert slurm.requeued == ["71234"]

    code = slurm.run("one_node.sbatch", *sixty_steps, SLURM_RESTART_COUNT=1, **variables)
    assert code == 0, slurm.log.read_text()
    assert f"resuming {run} at step {stopped}" in slurm.log.read_text()
    assert slurm.requeued == ["71234"]
    assert [line["step"] for line in step_lines(run)] == list(range(1, 61))
    assert losses(run) == losses(undisturbed)


def test_ranks_follow_from_nodes_and_tasks(slurm, job):
    variables = {"hosts": "a,b", "tasks": 2, "SLURM_CPUS_PER_TASK": 3, "RECIPE": "quickstart"}
    process = job("save finish", "many_nodes.sbatch", "training.seed=1", **variables)
    assert process.wait(timeout=60) == 0, slurm.log.read_text()
    found = tasks(slurm)
    assert [found[r]["LOCAL_RANK"] for r in range(4)] == ["0", "1", "0", "1"]
    assert [found[r]["RANK"] for r in range(4)] == ["0", "1", "2", "3"]
    for task in found.values():
        assert task["WORLD_SIZE"] == "4" and task["OMP_NUM_THREADS"] == "3"
        assert task["LOCAL_WORLD_SIZE"] == task["LOCAL_SIZE"] == "2"
        assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("a", "21234")
        assert task["arguments"][0] == "launch/train.py"
        assert task["arguments"][-1] == "training.seed=1"
        assert task["arguments"][3:5] == ["--recipe", "quickstart"]
        assert task["ignores"], "a warning would kill a task that does not listen yet"


def test_what_is_queued_again(slurm, job):
    assert job("").wait(timeout=60) == 0  # such as --dry-run
    assert slurm.requeued == []
    assert job("3").wait(timeout=60) != 0
    assert slurm.requeued == []
    assert job("save").wait(timeout=60) == 0
    assert "--recipe" in tasks(slurm)[0]["arguments"]
    assert len(slurm.requeued) == 1
    assert job("3").wait(timeout=60) != 0  # failed, though it can be resumed
    assert "--resume" in tasks(slurm)[0]["arguments"]
    assert job("save finish").wait(timeout=60) == 0
    assert job("").wait(timeout=60) == 0  # finished before
    assert len(slurm.requeued) == 1
    time.sleep(0.05)
    assert job("save").wait(timeout=60) == 0  # finished before, and told to do more steps
    assert len(slurm.requeued) == 2


def test_a_job_that_slurm_ends_is_saved_but_not_queued_again(slurm, job):
    process = job("wait save", tasks=1)
    while not (slurm.folder / "waits").exists():
        assert process.poll() is None, slurm.log.read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # scancel signals the shell as well as the tasks
    slurm.signal_tasks(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "slurm ends this job" in slurm.log.read_text()
    assert slurm.requeued == []


def test_another_directory_than_the_root_is_refused(slurm, job, tmp_path):
    assert job("save", SLURM_SUBMIT_DIR=tmp_path).wait(timeout=60) == 2
    assert "is not the root of the repository" in slurm.log.read_text()


@pytest.mark.parametrize("name", ["one_node.sbatch", "many_nodes.sbatch"])
def test_what_is_asked_of_slurm(name):
    text = (ROOT / "launch" / "slurm" / name).read_text()
    lines = text.split("\n\n")[0].splitlines()
    asked = {line.split("#SBATCH ")[1] for line in lines if line.startswith("#SBATCH ")}
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= asked
    assert text.count("#SBATCH ") == len(asked), "slurm reads no option below the first command"
    assert not os.access(ROOT / "launch" / "slurm" / name, os.X_OK)  # for sbatch, not for a shell
