"""Bytes this process hands to collectives, counted where torch.distributed dispatches them, so that none
can be missed; sorted by the function that asked, as `planning.communication` sorts what it predicts.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sra_ds.planning.case import Case
from sra_ds.planning.communication import CONTROL_BYTES, step_transfers
from sra_ds.planning.shapes import optimizer_groups

OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}
"""Operation of the dispatcher -> our name, and which argument holds what a process gives away."""
PURPOSES = {
    "over_ranks": "routing statistics",
    "_split_plan_from_expert_counts": "expert counts",
    "all_gather_into_tensor_dp_groups": "parameters",
    "_dist_allgather_fn": "parameters",
    "_post_step": "parameters",
    "reduce_scatter_coalesced": "gradients",
    "allreduce_bucket": "gradients",
    "_mean_over_ranks": "mean losses",
    "agreed": "stop flag",
}
"""Function on the stack, of DeepSpeed 0.19.8 or ours -> purpose; what is not named here is control."""
CONTROL = ("control", "all_reduce")

Sent = dict[tuple[str, str], int]
"""(purpose, operation) -> bytes."""


class CollectiveCounter(TorchDispatchMode):
    """While entered, counts in `bytes` what goes to groups of several processes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d" and name != "barrier" and _processes(args) > 1:
            operation, given = OPERATIONS.get(name, (name, 0))
            tensors = args[given] if isinstance(args[given], list) else [args[given]]
            held = (tensor for tensor in tensors if isinstance(tensor, Tensor))
            size = sum(tensor.numel() * tensor.element_size() for tensor in held)
            self.bytes[_purpose(operation), operation] += size
        return func(*args, **(kwargs or {}))


def planned_bytes(case: Case) -> Sent:
    """What planning says all processes together send in one step."""
    total: Counter[tuple[str, str]] = Counter()
    for transfer in step_transfers(case):
        total[transfer.purpose, transfer.operation] += round(case.layout.world * transfer.bytes)
    return dict(total)


def as_planned(counted: Sent, case: Case) -> bool:
    """Whether all processes together sent to the byte what was planned, and no more control than its
    bound."""
    rest = {key: size for key, size in counted.items() if key != CONTROL}
    bound = case.layout.world * len(optimizer_groups(case.shapes, case.layout)) * CONTROL_BYTES
    return rest == planned_bytes(case) and counted.get(CONTROL, 0) <= bound


def together(ranks: list[Sent]) -> Sent:
    """Bytes of all processes."""
    total: Counter[tuple[str, str]] = Counter()
    for rank in ranks:
        total.update(rank)
    return dict(total)


def _processes(args: Any) -> int:
    """Size of the group among a collective's arguments."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return int(dist.ProcessGroup.unbox(argument).size())
    raise AssertionError("a collective without a process group")


def _purpose(operation: str) -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in PURPOSES:
            return PURPOSES[name]
        if operation == "all_to_all" and frame.f_code.co_filename.endswith("auto_ep_layer.py"):
            return "expert rows"
        frame = frame.f_back
    return "control"
