"""A slurm of two programs: `srun` starts the tasks here, with the variables, signals and exit codes that
slurm 22.05 gave when the scripts ran under it; `scontrol` expands host names and notes what it is asked.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import ROOT, environment, write_corpus, write_recipe

SRUN = f"""#!{sys.executable}
import os, shlex, signal, subprocess, sys, time

arguments = sys.argv[1:]
options = {{}}
while arguments and arguments[0].startswith("--"):
    name, _, value = arguments.pop(0).partition("=")
    options[name] = value
assert set(options) == {{"--kill-on-bad-exit", "--distribution", "--cpus-per-task"}}, options
nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
count = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for number, node in enumerate(nodes):
    for local in range(count):
        known = {{
            "SLURM_PROCID": len(tasks),
            "SLURM_LOCALID": local,
            "SLURM_NODEID": number,
            "SLURM_NTASKS": len(nodes) * count,
            "SLURMD_NODENAME": node,
            "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_STEP_TASKS_PER_NODE": f"{{count}}(x{{len(nodes)}})",
        }}
        enter = shlex.split(os.environ.get("STUB_ENTER", "").format(node=node))
        environment = {{**os.environ, **{{key: str(value) for key, value in known.items()}}}}
        task = subprocess.Popen(enter + arguments, env=environment, start_new_session=True)
        tasks.append(task)
with open(os.environ["STUB_FOLDER"] + "/tasks", "w") as stream:
    print(*(task.pid for task in tasks), file=stream)

def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, number)

signal.signal(signal.SIGTERM, forward)
signal.signal(signal.SIGUSR1, forward)
while any(task.poll() is None for task in tasks):
    if any(task.returncode for task in tasks):
        forward(signal.SIGTERM, None)
        time.sleep(1)
        forward(signal.SIGKILL, None)
    time.sleep(0.02)
codes = [128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks]
sys.exit(max(codes))
"""

SCONTROL = """#!/usr/bin/env bash
set -euo pipefail
case "$1 ${2:-}" in
"show hostnames") tr , '\\n' <<<"$3" ;;
"requeue "*) echo "$2" >>"$STUB_FOLDER/requeued" ;;
*) exit 1 ;;
esac
"""


class Slurm:
    """Runs an .sbatch file as a job would run it, with the stubs first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def start(
        self,
        script: str,
        *overrides: str,
        hosts: str = "localhost",
        tasks: int = 2,
        **variables: object,
    ) -> subprocess.Popen[str]:
        """The job, started; it writes to `log`, as with --open-mode=append."""
        known = {
            "SLURM_JOB_ID": 71234,
            "SLURM_SUBMIT_DIR": ROOT,
            "SLURM_JOB_NODELIST": hosts,
            "SLURM_NTASKS_PER_NODE": tasks,
            "SLURM_CPUS_PER_TASK": 1,
            "STUB_FOLDER": self.folder,
            "PYTHON": sys.executable,
            **variables,
        }
        own = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
        asked = own | {key: str(value) for key, value in known.items()}
        asked["PATH"] = f"{self.folder}{os.pathsep}{asked['PATH']}"
        with self.log.open("a") as log:
            return subprocess.Popen(
                ["bash", ROOT / "launch" / "slurm" / script, *overrides],
                env=asked,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, script: str, *overrides: str, **options: object) -> int:
        """The exit code of a job that ran to its end."""
        return self.start(script, *overrides, **options).wait(timeout=300)

    def signal_tasks(self, number: signal.Signals) -> None:
        """As --signal without B: does: every process of the step, not the batch shell."""
        for pid in (self.folder / "tasks").read_text().split():
            os.killpg(int(pid), number)

    @property
    def log(self) -> Path:
        """What the jobs printed."""
        return self.folder / "log"

    @property
    def requeued(self) -> list[str]:
        """Jobs that were put back into the queue."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def slurm(tmp_path):
    """A slurm that nothing has asked yet."""
    return Slurm(tmp_path / "slurm")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a corpus and `tiny.yaml`, its data prepared on first use."""
    folder = tmp_path_factory.mktemp("launch")
    write_recipe(folder, write_corpus(folder / "text.jsonl"))
    return folder


@pytest.fixture(scope="session")
def sixty_steps():
    """Overrides: three seconds of training and no checkpoint before the last step."""
    nothing = ("evaluation.every=0", "checkpoint.every=0", "logging.sample_tokens=0")
    return ("training.steps=60", *nothing)


@pytest.fixture(scope="session")
def undisturbed(tiny, sixty_steps):
    """A run by two nodes of one task each, from start to end in one job."""
    slurm = Slurm(tiny / "slurm")
    variables = {"hosts": "localhost,other", "tasks": 1, "RECIPE": tiny / "tiny.yaml"}
    code = slurm.run("many_nodes.sbatch", *sixty_steps, **variables, RUN=tiny / "undisturbed")
    assert code == 0, slurm.log.read_text()
    assert slurm.requeued == []
    return tiny / "undisturbed"
