"""SIGTERM, SIGUSR1 and Ctrl-C through the real launcher: save and leave cleanly."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from commands import BIN, ROOT, TRAIN, _free_port, environment

ENDLESS = ("training.steps=1000000", "evaluation.every=0", "checkpoint.every=0")


@pytest.fixture
def running(tiny, tmp_path):
    """A run of two processes under the launcher, well under way."""
    run = tmp_path / "run"
    log = (tmp_path / "log").open("w")
    config = ROOT / "ds_configs" / "zero2.json"
    launcher = [BIN / "deepspeed", "--master_port", str(_free_port()), "--num_gpus", "2"]
    arguments = ["--deepspeed", config, "--recipe", tiny / "tiny.yaml", "--run", run, *ENDLESS]
    process = subprocess.Popen(
        [*launcher, TRAIN, *arguments],
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size < 2000:
        assert time.monotonic() < deadline and process.poll() is None, (
            tmp_path / "log"
        ).read_text()
        time.sleep(0.2)
    yield process, run, tmp_path / "log"
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    log.close()


def trainers(process):
    """The training processes below the launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [child for child in below if "--local_rank" in " ".join(child.cmdline())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves(running, number):
    process, run, log = running
    children = trainers(process)
    if number == signal.SIGINT:  # a terminal sends it to the whole group
        os.killpg(process.pid, number)
    elif number == signal.SIGTERM:  # what the launcher's node program forwards, one rank at a time
        psutil.Process(process.pid).children()[0].send_signal(number)
    else:  # slurm's warning, sent to the training processes
        for child in children:
            child.send_signal(number)
            child.send_signal(number)
    psutil.wait_procs(children, timeout=25)
    assert not any(child.is_running() and child.status() != "zombie" for child in children)
    text = log.read_text()
    assert "everything is saved" in text, text[-2000:]
    assert 'Traceback (most recent call last):\n  File "' + str(TRAIN) not in text
    saved = (run / "checkpoints" / "latest").read_text()
    assert (run / "checkpoints" / saved / "manifest.json").is_file()
    assert not list((run / "checkpoints").glob("*.partial"))
    process.wait(timeout=30)
