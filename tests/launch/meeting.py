"""What a process of `test_rendezvous` does; importable by processes of a fork server."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sra_ds.training import rendezvous


def attend(rank: int, folder: Path, variables: dict[str, str], misbehaviour: str = "") -> None:
    """Start together with the others and write down what came of it and how long it took."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"host-{rank}"}
    os.environ |= variables
    rendezvous.SILENCE_SECONDS = 1.5
    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        rendezvous.start_together(lambda: join(misbehaviour))
        told = f"{time.monotonic() - began:.3f}"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.partial").write_text(told)
    (folder / f"{rank}.partial").rename(folder / str(rank))
    sys.stdout.flush()
    os._exit(0)


def join(misbehaviour: str) -> None:
    """Make a gloo group, and do what a broken process does instead or afterwards."""
    if misbehaviour == "freezes":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif misbehaviour == "fails":
        raise ValueError("the accelerator is on fire\nframe 1")
    dist.init_process_group("gloo")
    if misbehaviour == "is busy":
        time.sleep(600)
    elif misbehaviour == "freezes later":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif misbehaviour == "is killed later":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    attend(int(os.environ["RANK"]), Path(sys.argv[1]), {})
