"""Scoring by several processes: which part one takes, and the sums over all."""

from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

Item = TypeVar("Item")


def share_of_rank(items: list[Item], batch_size: int, filler: Item) -> list[Item]:
    """What this rank scores. Every rank runs the same number of forward passes, which ZeRO-3 needs:
    short shares are filled."""
    if not _connected():
        return items
    world, rank = dist.get_world_size(), dist.get_rank()
    size = -(-len(items) // world)
    size = -(-size // batch_size) * batch_size
    mine = items[rank * size : (rank + 1) * size]
    return mine + [filler] * (size - len(mine))


def sum_over_ranks(*arrays: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Each array's sum, the same on all ranks. Collective where processes are connected."""
    if not _connected():
        return list(arrays)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flat: Any = torch.from_numpy(np.concatenate([a.ravel() for a in arrays])).to(device)
    dist.all_reduce(flat)
    parts = flat.cpu().split([a.size for a in arrays])
    return [p.numpy().reshape(a.shape) for p, a in zip(parts, arrays, strict=True)]


def _connected() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
