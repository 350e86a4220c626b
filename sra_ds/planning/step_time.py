"""Seconds of an optimizer step, from the data sheets: a bound from above and one from below.

    compute        FLOPs / (peak x efficiency); experts no faster than their weights are read
    launches       kernels the host starts x seconds each
    communication  every collective as a ring at the slowest link it crosses, plus log2(n) hops a call
    offload        bytes between GPU and host / PCIe
    update         optimizer states read and written once, at the memory's bandwidth

    conservative = compute + launches + communication + offload + update      nothing overlaps
    optimistic   = max(compute, launches, communication, offload) + update    everything overlaps

The optimistic bound overlaps what cannot fully overlap: the first layer's gradients are reduced after the
backward pass, and experts wait for their tokens. A ring over several nodes leaves each node by as many
ports as it has members there. None of this was measured.
"""

import math
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.planning.case import Case
from sra_ds.planning.communication import Transfer
from sra_ds.planning.hardware import HOST_BANDWIDTH, LATENCY, LAUNCH, PCIE, Gpu, Network
from sra_ds.planning.offload import host_traffic
from sra_ds.planning.shapes import optimizer_groups

STATE_BYTES = 28
"""Read and written per parameter of a partition by AdamW: gradient, and twice master copy and moments."""
EXPERT_KERNELS, DENSE_KERNELS = 130, 45
"""Of a layer with experts or without, for one pass in one direction; counted as operators
(tests/planning/test_step_time.py)."""
END_KERNELS = 50
"""Of the embedding, head and losses for both passes of a micro-batch; counted."""
PARAMETER_KERNELS = 10
"""Assumed per parameter and step: into a bucket, out of it, its norm, scaled, updated, copied back."""


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
    launches: float
    communication: float
    offload: float
    update: float
    waits_for_weights: bool
    """Whether experts have fewer rows than `Gpu.compute_bound_rows`."""

    @property
    def conservative(self) -> float:
        """Nothing overlaps."""
        return self.compute + self.launches + self.communication + self.offload + self.update

    @property
    def optimistic(self) -> float:
        """Everything but the update happens at the same time."""
        return max(self.compute, self.launches, self.communication, self.offload) + self.update


def step_work(case: Case, counts: dict[str, Any]) -> Work:
    """6 FLOPs per active parameter and token and 6 T D per layer for attention, as
    `flops.flops_per_token`; checkpointing repeats the forward third of all but the head. Experts held
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
    gpu, world, rows = machine.gpu, case.layout.world, case.rows_per_expert
    speed = gpu.flops(case.width) * machine.efficiency
    products, reads = work.expert_flops / speed, work.expert_reads / gpu.bandwidth
    return StepTime(
        compute=work.dense_flops / speed + max(products, reads),
        launches=step_kernels(case) * LAUNCH,
        communication=sum(transfer_seconds(t, machine.network, world) for t in transfers),
        offload=sum(host_traffic(case)) / PCIE,
        update=_update_seconds(case, machine),
        waits_for_weights=rows is not None and rows < gpu.compute_bound_rows(case.width),
    )


def step_kernels(case: Case) -> int:
    """Kernels of one step: two passes a micro-batch, three with activation checkpointing."""
    model, again = case.recipe.model, case.recipe.training.activation_checkpointing
    layer = EXPERT_KERNELS if isinstance(model.channel, MoEChannelConfig) else DENSE_KERNELS
    micro_batch = model.layers * layer * (3 if again else 2) + END_KERNELS
    return case.accumulation * micro_batch + PARAMETER_KERNELS * len(case.shapes.weights)


def transfer_seconds(transfer: Transfer, network: Network, world: int) -> float:
    """Seconds of one kind of collective."""
    hops = transfer.calls * LATENCY * math.ceil(math.log2(transfer.processes))
    spread = worst_spread(world, transfer.processes, transfer.neighbours, network.gpus_per_node)
    return hops + _wire_seconds(transfer, spread, network)


class Spread(NamedTuple):
    """Nodes that a group of processes lies on, and its fewest members on one of them."""

    nodes: int
    members: int


@cache
def worst_spread(world: int, processes: int, neighbours: bool, per_node: int) -> Spread:
    """Of all groups of so many processes the one on most nodes, then with fewest members on one.
    Neighbours are consecutive ranks; other groups take every (world / processes)-th."""
    stride = 1 if neighbours else world // processes
    starts = range(0, world, processes) if neighbours else range(stride)
    found = []
    for start in starts:
        ranks = range(start, start + processes * stride, stride)
        members = Counter(rank // per_node for rank in ranks)
        found.append(Spread(len(members), min(members.values())))
    return max(found, key=lambda spread: (spread.nodes, -spread.members))


def _wire_seconds(transfer: Transfer, spread: Spread, network: Network) -> float:
    wire, members = transfer.wire_bytes, spread.members
    if spread.nodes == 1:
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
    if case.zero.optimizer_on_host:
        return partition * STATE_BYTES / (HOST_BANDWIDTH / machine.network.gpus_per_node)
    return partition * (STATE_BYTES + case.width) / machine.gpu.bandwidth
