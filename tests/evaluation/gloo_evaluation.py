"""Bodies of the processes of `test_world_size`; importable by spawned processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sra_ds.model.language_model import LanguageModel


def score_rank(
    rank: int,
    world_size: int,
    folder: Path,
    model: LanguageModel,
    score: Callable[[Any], object],
) -> None:
    """`score(model)` as one of `world_size` processes; every rank saves what it got."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    forwards = 0

    def counted(*batch: torch.Tensor | None) -> object:
        nonlocal forwards
        forwards += 1
        return model(*batch)

    result = score(counted)
    torch.save((forwards, result), folder / f"rank{rank}.pt")
    dist.destroy_process_group()
