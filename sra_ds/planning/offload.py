"""Bytes that cross between a GPU and its host in one optimizer step when states are offloaded.

DeepSpeed 0.19.8, A micro-batches a step, P elements of this process's partition of w bytes each, T of the
whole parameters that overlap it; both directions together:

    gradients    stage 1  4 P, and with A > 1 T w to the host and back
                 stage 2  4 P, and with A > 1 A x T w to the host and (A - 1) x T w back
                 stage 3  4 P, and A x P w to the host and back
    parameters   what stage 3 gathers of this process's own, for every micro-batch
    updated      P w after the update, unless the parameters stay on the host

Every micro-batch's gradients are added on the GPU to what comes back from the host
(`async_accumulate_grad_in_cpu_via_gpu`; at stage 3 `partition_grads`, which copies them back also after
the first); the last sum is sent in float32 for the optimizer.
"""

from typing import NamedTuple

from sra_ds.planning.case import Case
from sra_ds.planning.communication import parameter_gathers
from sra_ds.planning.shapes import optimizer_groups

FLOAT = 4


class HostTraffic(NamedTuple):
    """Bytes of one process and step, both directions together."""

    gradients: float
    parameters: float
    updated: float


def host_traffic(case: Case) -> HostTraffic:
    """Nothing without offloading."""
    zero, w = case.zero, case.width
    partition = sum(group.partition for group in optimizer_groups(case.shapes, case.layout))
    gathers = parameter_gathers(case) if zero.parameters_on_host else []
    return HostTraffic(
        gradients=_gradients(case, partition) if zero.optimizer_on_host else 0,
        parameters=sum(gather.bytes for gather in gathers),
        updated=partition * w if zero.optimizer_on_host != zero.parameters_on_host else 0,
    )


def _gradients(case: Case, partition: int) -> int:
    times, last = case.accumulation, partition * FLOAT
    if case.zero.stage == 3:
        return last + 2 * times * partition * case.width
    if times == 1:
        return last
    groups = optimizer_groups(case.shapes, case.layout)
    touched = sum(group.touched for group in groups) * case.width
    return last + (2 if case.zero.stage == 1 else 2 * times - 1) * touched
