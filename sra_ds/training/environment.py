"""The process a run lives in: variables that must be set before DeepSpeed starts, and what was found.

Plain `python`, `torchrun` and the `deepspeed` launcher all come through here.
"""

import os
import resource
import socket
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import psutil
import torch

from sra_ds.errors import BackendUnavailable
from sra_ds.heap import keep_freed_memory
from sra_ds.ops.linear import linear
from sra_ds.timing import wall_clock

SINGLE_PROCESS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}
LOCK_GRACE_SECONDS = 30


DEVICES = ("auto", "cpu", "cuda", "mps")


def prepare_process(device: str = "auto") -> None:
    """Set what torch and DeepSpeed read at start; safe to call twice. `device` is one of `DEVICES`.

    Raises `BackendUnavailable` for a device that is not here, and for a build lock that a killed
    compilation left behind.
    """
    if device != "auto":
        require_device(device)
        os.environ["DS_ACCELERATOR"] = device
    if "RANK" not in os.environ:
        os.environ.update({**SINGLE_PROCESS, "MASTER_PORT": str(free_port()), **os.environ})
    if "TORCH_EXTENSIONS_DIR" not in os.environ and sys.prefix != sys.base_prefix:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    programs = str(Path(sys.executable).parent)  # ninja lives beside a virtual environment's python
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", "")])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place_on_machine()[1]))
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 is about to drop
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    keep_freed_memory()
    refuse_stale_build_locks()


def refuse_stale_build_locks() -> None:
    """torch waits forever for a lock whose owner was killed; say so instead."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    for lock in Path(root).glob("**/lock") if root else []:
        if (
            not _being_built(lock.parent)
            and time.time() - lock.stat().st_mtime > LOCK_GRACE_SECONDS
        ):
            raise BackendUnavailable(
                f"{lock} was left by a compilation that was killed; nothing builds there now: "
                f"delete it and start again (rm '{lock}')"
            )


def be_local_rank(rank: int, world_size: int, port: int) -> None:
    """Make this process one of several on this machine, as a launcher would."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    place |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"


def leave(code: int = 0) -> NoReturn:
    """End one of several processes without closing the interpreter: other ranks may wait in a collective,
    and gloo's threads may still free tensors, which aborts an interpreter that closes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    """A TCP port nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _being_built(folder: Path) -> bool:
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder:
                return True
        except (psutil.Error, OSError):
            continue
    return False


def require_device(device: str) -> None:
    """Raises `BackendUnavailable` unless torch can use it."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(device, True):
        raise BackendUnavailable(
            f"--device {device}: torch {torch.__version__} finds none here; take auto or cpu"
        )


def choose_device() -> tuple[torch.device, str]:
    """The device of this process and why: the one that was asked for, else a GPU, else the CPU."""
    asked = os.environ.get("DS_ACCELERATOR")
    if asked == "mps":
        require_device(asked)
        return torch.device("mps"), "asked for; nothing here was ever run on one"
    if asked != "cpu" and torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(index)
        return torch.device("cuda", index), torch.cuda.get_device_name(index)
    if torch.cuda.is_available():
        reason = "asked for"
    elif torch.version.cuda is None:
        reason = "this torch has no CUDA"
    else:
        reason = "no CUDA device is visible"
    return torch.device("cpu"), f"{reason}; {torch.get_num_threads()} threads"


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies bf16 faster than float32."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


PEAK_FLOPS = {  # dense bf16, from the vendors' data sheets
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of this device and where the number comes from: a data sheet, or a measured product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        for name, value in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name(device):
                return value, f"data sheet of {name}"
    size = 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    milliseconds = min(wall_clock(lambda: linear(a, a)) for _ in range(16))
    return 2e3 * size**3 / milliseconds, f"measured {size}x{size} product"


def peak_memory(device: torch.device) -> int:
    """Bytes of a GPU that tensors of this process held at most, or of main memory that it did."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def place_on_machine() -> tuple[int, int]:
    """This process's number among those on its machine, and how many they are; a launcher that does not
    say has put one on each."""
    # torchrun and the DeepSpeed launcher name it differently
    many = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return int(os.environ.get("LOCAL_RANK", "0")) % many, many


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))
