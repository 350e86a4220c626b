"""A plan as one tree of numbers (`--json`), and as a table for people."""

import shlex
from typing import Any

from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.planning.break_even import break_even
from sra_ds.planning.hardware import (
    EFFICIENCY,
    GB,
    HOST_BANDWIDTH,
    LATENCY,
    LAUNCH,
    PCIE,
    RUNTIME_BYTES,
    USABLE,
)
from sra_ds.planning.offload import host_traffic
from sra_ds.planning.plan import (
    Candidate,
    candidates,
    expert_parallel_sizes,
    fitting_cards,
    recommended,
)
from sra_ds.planning.request import Request
from sra_ds.planning.shapes import read_shapes
from sra_ds.planning.step_time import (
    DENSE_KERNELS,
    END_KERNELS,
    EXPERT_KERNELS,
    PARAMETER_KERNELS,
    step_kernels,
)
from sra_ds.planning.units import SECONDS_PER_DAY

FOLDER = "ds_configs"
WIDTHS = {"bf16": 2, "fp32": 4}
ASSUMPTIONS = {
    "usual_efficiency": EFFICIENCY,
    "usable_share_of_memory": USABLE,
    "runtime_bytes": RUNTIME_BYTES,
    "latency_seconds_per_hop": LATENCY,
    "launch_seconds_per_kernel": LAUNCH,
    "kernels_per_layer_and_pass": {"experts": EXPERT_KERNELS, "dense": DENSE_KERNELS},
    "kernels_per_micro_batch": END_KERNELS,
    "kernels_per_parameter_and_step": PARAMETER_KERNELS,
    "pcie_bytes_per_second": PCIE,
    "host_memory_bytes_per_second": HOST_BANDWIDTH,
}
"""Not of a data sheet, but of planning/hardware.py and planning/step_time.py."""


def make_plan(request: Request, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Everything `tools/plan.py --json` prints; `configs` by file name."""
    found = candidates(request, configs)
    best = recommended(found)
    recipe, machine = request.recipe, request.machine
    width = 4 if recipe.training.precision == "fp32" else 2
    counts = count_parameters(build_model(recipe, "meta"))
    return {
        "recipe": recipe.name,
        "parameters": {key: counts[key] for key in ("total", "active_with_anchors")},
        "experts_per_token": getattr(recipe.model.channel, "top_k", None),
        "ignored_top_k_schedule": recipe.training.top_k_schedule,
        "gpus": request.gpus,
        "nodes": machine.network.nodes,
        "gpu": {**machine.gpu._asdict(), "planned_memory": request.memory},
        "host_memory_of_a_node": request.host_memory,
        "network": machine.network._asdict(),
        "assumptions": {"efficiency": machine.efficiency, **ASSUMPTIONS},
        "tokens_per_step": request.step_tokens,
        "token_budget": request.tokens,
        "compute_bound_rows_per_expert": {
            name: machine.gpu.compute_bound_rows(size) for name, size in WIDTHS.items()
        },
        "break_even": _break_even(request, width),
        "candidates": [_row(request, candidate) for candidate in found],
        "recommendation": None if best is None else _recommendation(request, best),
    }


def _row(request: Request, candidate: Candidate) -> dict[str, Any]:
    start = {
        "config": candidate.config,
        "stage": candidate.zero.stage,
        "expert_parallel_size": candidate.ep,
    }
    if candidate.refused:
        return {**start, "refused": candidate.refused, "fits": False}
    case, memory, time = candidate.case, candidate.memory, candidate.time
    assert case is not None and memory is not None and time is not None
    sent: dict[str, dict[str, float]] = {}
    for transfer in candidate.transfers:
        key = f"{transfer.purpose} {transfer.operation}"
        old = sent.get(key, {"bytes": 0, "wire_bytes": 0, "calls": 0})
        new = {"bytes": transfer.bytes, "wire_bytes": transfer.wire_bytes, "calls": transfer.calls}
        sent[key] = {name: old[name] + value for name, value in new.items()}
    return {
        **start,
        "precision": "fp32" if case.width == 4 else "bf16",
        "activation_checkpointing": case.recipe.training.activation_checkpointing,
        "micro_batch_size": case.windows,
        "accumulation": case.accumulation,
        "fits": candidate.fits,
        "memory_bytes": {**memory._asdict(), "peak": memory.peak},
        "host_bytes_per_node": memory.host * request.machine.network.gpus_per_node,
        "fits_cards": [f"{card / GB:.0f}GB" for card in fitting_cards(candidate, request.machine)],
        "tokens_per_expert": case.rows_per_expert,
        "waits_for_weights": time.waits_for_weights,
        "sent_per_step": sent,
        "host_traffic_per_step": host_traffic(case)._asdict(),
        "kernels_per_step": step_kernels(case),
        "seconds_per_step": {
            "optimistic": time.optimistic,
            "conservative": time.conservative,
            "compute": time.compute,
            "launches": time.launches,
            "communication": time.communication,
            "offload": time.offload,
            "update": time.update,
        },
        **_whole_run(request, candidate),
    }


def _whole_run(request: Request, candidate: Candidate) -> dict[str, Any]:
    """Days and cost to the token budget, from the optimistic and the conservative step."""
    case, time = candidate.case, candidate.time
    assert case is not None and time is not None
    steps = request.tokens / case.step_tokens
    days = [steps * s / SECONDS_PER_DAY for s in (time.optimistic, time.conservative)]
    cost = None
    if request.price is not None:
        cost = [day * 24 * request.gpus * request.price for day in days]
    return {"days": days, "cost": cost}


def _break_even(request: Request, width: int) -> list[dict[str, Any]]:
    recipe, world = request.recipe, request.gpus
    sizes = [ep for ep in expert_parallel_sizes(recipe, world) if ep > 1]
    shapes = read_shapes(recipe)
    return [break_even(recipe, shapes, world, ep, width)._asdict() for ep in sizes]


def _recommendation(request: Request, best: Candidate) -> dict[str, Any]:
    """The configuration, the recipe's keys and the command."""
    case, network = best.case, request.machine.network
    assert case is not None
    keys = _keys(request, best)
    named = {key.split("=")[0] for key in keys}
    kept = [override for override in request.overrides if override.split("=")[0] not in named]
    config = f"{FOLDER}/{best.config}"
    arguments, name = shlex.join([*kept, *keys]), shlex.quote(request.recipe_name)
    train = f"launch/train.py --deepspeed {config} --recipe {name} {arguments}"
    gpus = f"--num_gpus {network.gpus_per_node}"
    found = {"config": config, "overrides": keys, "command": f"deepspeed {gpus} {train}"}
    if network.nodes > 1:
        hosts = f"--hostfile HOSTFILE --num_nodes {network.nodes}"
        per_node = network.gpus_per_node
        found |= {
            "command": f"deepspeed {hosts} {gpus} {train}",
            "slurm": f"DEEPSPEED={config} RECIPE={name} sbatch "
            f"--nodes={network.nodes} --ntasks-per-node={per_node} --gpus-per-node={per_node} "
            f"launch/slurm/many_nodes.sbatch {arguments}",
        }
    return {**_row(request, best), **found}


def _keys(request: Request, best: Candidate) -> list[str]:
    """What the recipe has to say differently."""
    case, own = best.case, request.recipe.training
    assert case is not None
    keys = [f"training.micro_batch_size={case.windows}"]
    if best.ep > 1:
        keys += [f"parallel.expert_parallel_size={best.ep}", "model.channel.backend=deepspeed"]
    if case.recipe.training.activation_checkpointing and not own.activation_checkpointing:
        keys.append("training.activation_checkpointing=true")
    return keys
