"""The processes of one run: joining, leaving, and routing statistics over all of them."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from sra_ds.moe.routing import Routing
from sra_ds.processes import several
from sra_ds.training.rendezvous import start_together


def start_processes() -> None:
    """Join the other processes of the run, or say which host does not come (`TrainingError`); first use
    compiles DeepSpeed's shared-memory op on CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    start_together(lambda: deepspeed.init_distributed(verbose=False))
    unname_shared_memory()


def unname_shared_memory() -> None:
    """Take the names off the 69 MB each process shares with the others through DeepSpeed on a CPU: it
    leaves them behind for ever, and a run on the same port could open one of them. Collective."""
    if not several() or dist.get_backend() != "gloo":
        return
    dist.barrier()  # all have opened all
    place = (
        f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{dist.get_rank()}"
    )
    Path("/dev/shm", f"deepspeed_allreduce_buffer_{place}").unlink(missing_ok=True)


def finish_processes() -> None:
    """Leave the process group so that no rank waits for one that is gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def over_ranks(routings: Sequence[Routing]) -> list[Routing]:
    """Routing statistics of all data ranks instead of this one, with this rank's gradient.

    p = p_global.detach() + p_local - p_local.detach(): after gradients are averaged over ranks this is
    the gradient of a loss of the global mean, so auxiliary losses do not depend on the world size. One
    collective for all layers. Without processes the statistics are returned as they are.
    """
    if not (several() and routings):
        return list(routings)
    world = dist.get_world_size()
    local = [
        torch.cat([r.load_E, r.mean_probs_E.detach() * r.valid_count, r.valid_count.view(1)])
        for r in routings
    ]
    flat = torch.cat(local)
    dist.all_reduce(flat)
    result = []
    for routing, summed in zip(routings, flat.split([len(part) for part in local]), strict=True):
        experts = len(routing.load_E)
        load_E, probs_E, count = summed.split([experts, experts, 1])
        mean_E = probs_E / count.clamp(min=1)
        # the loss is divided by the mean count of a rank, as gradients are averaged, not summed
        own_E = routing.mean_probs_E * (routing.valid_count * world / count.clamp(min=1))
        result.append(
            routing._replace(
                load_E=load_E,
                mean_probs_E=mean_E + own_E - own_E.detach(),
                valid_count=count.squeeze(0) / world,
            )
        )
    return result
