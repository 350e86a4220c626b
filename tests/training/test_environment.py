"""What is settled before DeepSpeed starts, and the failures that are the machine's."""

import errno
import os
import time

import pytest
import torch
from safetensors import SafetensorError

from commands import BIN, call
from sra_ds.errors import BackendUnavailable
from sra_ds.training.environment import (
    choose_device,
    prepare_process,
    refuse_stale_build_locks,
)
from sra_ds.training.health import RecentLoad


def test_a_lock_left_by_a_killed_build_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    refuse_stale_build_locks()  # young: a build may just have begun
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    with pytest.raises(BackendUnavailable, match="rm '"):
        refuse_stale_build_locks()


def test_a_lock_of_a_build_that_runs_is_respected(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    monkeypatch.chdir(lock.parent)  # this process stands in for ninja
    refuse_stale_build_locks()


def test_prebuild_is_done_already():
    result = call(BIN / "python", "-m", "sra_ds.training.prebuild")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "micro_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space left"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"),
            "no space left",
        ),
    ],
)
def test_limits_of_the_machine_give_a_remedy_in_one_line(error, says, tmp_path):
    from sra_ds.moe.placement import WHOLE
    from sra_ds.storage.run_dir import RunDir
    from sra_ds.training.ds_config import BatchPlan
    from sra_ds.workflow.resolve import Resolved
    from sra_ds.workflow.train import _remedy

    plan = BatchPlan(8, 8, 1, 1)
    resolved = Resolved(None, {}, plan, torch.device("cpu"), torch.float32, WHOLE, {})
    text = _remedy(error, resolved, RunDir(tmp_path / "run"))
    assert says in text and "\n" not in text
    assert _remedy(ValueError("a bug"), resolved, RunDir(tmp_path / "run")) is None


def test_recent_load_covers_the_newest_window():
    from sra_ds.moe.routing import route

    recent = RecentLoad(window_tokens=20)
    for step in range(10):
        scores = torch.zeros(8, 4)
        scores[:, step % 4] = 1.0
        recent.add([route(scores, 1, "selected")], tokens=8)
    assert recent.tokens == 24
    assert recent.load_LE.sum() == 24
    assert recent.summary()["dead"] == 1


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match=f"--device {device}: .* take auto or cpu"):
        prepare_process(device)


def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    device, reason = choose_device()
    assert device.type == "cpu" and reason.startswith("asked for")
