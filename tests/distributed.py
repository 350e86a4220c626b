"""Several gloo processes on one machine, running a plain top-level function."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world: int, body: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`body(*arguments)` on `world` connected processes; what each returned, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, port, folder, body, arguments), nprocs=world, join=True)
        return [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(world)]


def _rank(
    rank: int, world: int, port: int, folder: str, body: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.save(body(*arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
