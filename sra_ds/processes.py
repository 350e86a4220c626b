"""The processes that are connected: how many, which one this is, and what they have together.

Until they are, and where there is one, each function answers for this process alone. How a launcher
placed it, which is known before, is in `sra_ds.training.environment`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Said = TypeVar("Said")


def several() -> bool:
    """Whether more than one process is connected."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if several() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if several() else 1


def from_first(text: str) -> str:
    """Rank 0's text, on every rank. Collective."""
    shared = [text]
    if several():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def from_all(said: Said) -> list[Said]:
    """What every rank says, by rank. Collective."""
    if not several():
        return [said]
    whole: list[Any] = [None] * world_size()
    dist.all_gather_object(whole, said)
    return whole


def together(
    act: Callable[[], Said], problem: type[Exception], only_first: bool = False
) -> Said | None:
    """What `act` gives on this process, or on rank 0 alone. If it fails on one, every process raises: its
    own exception, or a `problem` that names the other. Collective."""
    result, failure = None, None
    try:
        if not only_first or rank() == 0:
            result = act()
    except Exception as error:
        failure = error
    failures = from_all(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for number, text in enumerate(failures):
        if text is not None:
            raise problem(f"process {number}: {text}")
    return result


def any_of(flag: bool) -> bool:
    """Whether it is true on any rank. Collective."""
    if not several():
        return flag
    found = torch.tensor([float(flag)], device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of each value over all ranks. Collective."""
    if not several():
        return values
    summed = values.clone()
    dist.all_reduce(summed)
    return summed / world_size()


def sum_over_ranks(*arrays: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Each array's sum, the same on all ranks. Collective."""
    if not several():
        return list(arrays)
    flat: Any = torch.from_numpy(np.concatenate([a.ravel() for a in arrays])).to(_device())
    dist.all_reduce(flat)
    parts = flat.cpu().split([a.size for a in arrays])
    return [p.numpy().reshape(a.shape) for p, a in zip(parts, arrays, strict=True)]


def _device() -> str:
    """Where tensors live that are sent."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
