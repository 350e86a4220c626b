"""Seconds of an optimizer step, from the data sheets: a bound from above and one from below.

    compute        FLOPs / (peak x efficiency); experts no faster than their weights are read
    update         optimizer states read and written once, at the memory's bandwidth
    communication  every collective as a ring at the slowest link it crosses, plus log2(n) hops a call

    conservative = compute + communication + update      nothing overlaps
    optimistic   = max(compute, communication) + update  everything overlaps

A ring over several nodes leaves each node by as many ports as it has members there. None of this was
measured.
"""

import math
from typing import Any, NamedTuple

from sra_ds.errors import ConfigError
from sra_ds.planning.case import Case
from sra_ds.planning.communication import Transfer
from sra_ds.planning.hardware import HOST_MEMORY, LATENCY, PCIE, Gpu, Network
from sra_ds.planning.shapes import optimizer_groups

STATE_BYTES = 28
"""Read and written per parameter of a partition by AdamW: gradient, and twice master copy and moments."""


class Machine(NamedTuple):
    """GPUs, their network, and the share of the peak that a step reaches."""

    gpu: Gpu
    network: Network
    efficiency: float


def make_machine(gpu: Gpu, network: Network, efficiency: float) -> Machine:
    """Raises `ConfigError` for an efficiency above 1."""
    if efficiency > 1:
        raise ConfigError(f"--efficiency {efficiency}: a share of the peak, at most 1")
    return Machine(gpu, network, efficiency)


class Work(NamedTuple):
    """FLOPs and bytes of one process for one step."""

    dense_flops: float
    expert_flops: float
    expert_reads: float
    """Bytes of experts' weights that are read."""


class StepTime(NamedTuple):
    """Seconds."""

    compute: float
    update: float
    communication: float
    waits_for_weights: bool
    """Whether reading the experts' weights takes longer than their products."""

    @property
    def conservative(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.update + self.communication

    @property
    def optimistic(self) -> float:
        """All communication happens during computation."""
        return max(self.compute, self.communication) + self.update


def step_work(case: Case, counts: dict[str, Any]) -> Work:
    """6 FLOPs per active parameter and token and 6 T D per layer for attention, as
    `counting.flops_per_token`; checkpointing repeats the forward third of all but the head. Experts held
    here are read once forwards and twice backwards (for two products) in every micro-batch, and once
    more where the forward pass is repeated."""
    model, again = case.recipe.model, case.recipe.training.activation_checkpointing
    active = counts["active_by_part"]
    attention = case.recipe.data.sequence_length * model.width * model.layers
    head, experts = active["embedding_head"], active["experts"]
    rest = counts["active_with_anchors"] - experts - head + attention
    tokens, repeated = case.tokens * case.accumulation, 4 / 3 if again else 1.0
    held = sum(case.layout.held(weight) for weight in case.shapes.weights if weight.expert)
    return Work(
        dense_flops=6 * (head + rest * repeated) * tokens,
        expert_flops=6 * experts * repeated * tokens,
        expert_reads=(4 if again else 3) * case.accumulation * held * case.width,
    )


def step_time(case: Case, work: Work, transfers: list[Transfer], machine: Machine) -> StepTime:
    """Seconds of one step."""
    speed = machine.gpu.flops(case.width) * machine.efficiency
    products, reads = work.expert_flops / speed, work.expert_reads / machine.gpu.bandwidth
    return StepTime(
        compute=work.dense_flops / speed + max(products, reads),
        update=_update_seconds(case, machine),
        communication=sum(transfer_seconds(t, machine.network) for t in transfers),
        waits_for_weights=reads > products,
    )


def transfer_seconds(transfer: Transfer, network: Network) -> float:
    """Seconds of one kind of collective."""
    nodes = min(network.nodes, transfer.processes)
    if transfer.neighbours:
        nodes = -(-transfer.processes // network.gpus_per_node)
    hops = transfer.calls * LATENCY * math.ceil(math.log2(transfer.processes))
    return hops + _wire_seconds(transfer, nodes, network)


def _wire_seconds(transfer: Transfer, nodes: int, network: Network) -> float:
    wire, members = transfer.wire_bytes, transfer.processes / nodes
    if nodes == 1:
        return wire / network.intra
    if transfer.operation == "all_to_all":  # each to each: what leaves the node leaves by one port
        away = (transfer.processes - members) / (transfer.processes - 1)
        return max(wire * away / network.inter, wire * (1 - away) / network.intra)
    ports = members * network.inter
    return wire / (min(ports, network.intra) if members > 1 else ports)


def _update_seconds(case: Case, machine: Machine) -> float:
    if case.zero.stage == 0:
        held = sum(case.layout.held(weight) for weight in case.shapes.weights)
        return held * STATE_BYTES / machine.gpu.bandwidth
    partition = sum(group.partition for group in optimizer_groups(case.shapes, case.layout))
    if not case.zero.optimizer_on_host:
        return partition * (STATE_BYTES + case.width) / machine.gpu.bandwidth
    moved = 2 * partition * case.width / PCIE
    return moved + partition * STATE_BYTES / (HOST_MEMORY / machine.network.gpus_per_node)
