"""Every shipped DeepSpeed configuration and expert-parallel size for a recipe on a machine: what fits,
what it sends, how long a step takes; and which to start, with what command.

For each pair the largest micro-batch that fits is taken, with activation checkpointing if none fits
without or the step is clearly shorter; `training.micro_batch_size` is binding as an override, and chosen
here where the recipe has it. Recommended is the simplest of the pairs whose step is about the shortest
when nothing overlaps: times are not known to 5 %. Configurations for several nodes are left out on one
and preferred on several. Expert parallelism is tried over divisors of the processes and the experts;
precision is bf16 unless the recipe or stage 0 forbid it. Experts per token are `model.channel.top_k`
throughout.
"""

import math
from typing import Any, NamedTuple

import torch

from sra_ds.config import Recipe
from sra_ds.config.model import MoEChannelConfig
from sra_ds.errors import ConfigError
from sra_ds.model.counting import count_parameters
from sra_ds.model.language_model import build_model
from sra_ds.planning.case import Case
from sra_ds.planning.communication import Transfer, step_transfers
from sra_ds.planning.hardware import CARDS
from sra_ds.planning.memory import Memory, estimate
from sra_ds.planning.request import Request
from sra_ds.planning.shapes import Layout, Shapes, read_shapes
from sra_ds.planning.step_time import Machine, StepTime, step_time, step_work
from sra_ds.planning.zero import Zero, read_zero, require_planned
from sra_ds.training.ds_config import (
    choose_precision,
    merge_ds_config,
    plan_batches,
    zero_stage,
)
from sra_ds.training.placement import choose_placement

NEAR = 0.05
"""Steps that differ by no more than this share count as equally long."""
MULTINODE = "_multinode.json"
"""How configurations for several nodes are named."""


class Candidate(NamedTuple):
    """One configuration and expert-parallel size; `refused` says why it cannot be run at all."""

    config: str
    zero: Zero
    ep: int
    refused: str = ""
    case: Case | None = None
    memory: Memory | None = None
    transfers: tuple[Transfer, ...] = ()
    time: StepTime | None = None
    fits: bool = False
    smallest: int = 0
    """Bytes on the device with the smallest micro-batch, recomputing if that helps."""


def candidates(request: Request, configs: dict[str, dict[str, Any]]) -> list[Candidate]:
    """All pairs of a configuration (by file name) and an expert-parallel size; raises `ConfigError` for a
    batch or micro-batch that does not divide."""
    recipe, gpus, sizes = request.recipe, request.gpus, micro_batch_sizes(request)
    counts = count_parameters(build_model(recipe, "meta"))
    sought = _Sought(request, sizes, read_shapes(recipe), counts)
    found = []
    for name, config in configs.items():
        if name.endswith(MULTINODE) and request.machine.network.nodes == 1:
            continue
        require_planned(config, name)
        zero = read_zero(config)
        for ep in expert_parallel_sizes(recipe, gpus):
            reason = refusal(_spread(recipe, ep), config, name, gpus)
            plain = Candidate(name, zero, ep, reason)
            found.append(plain if reason else _planned(sought, plain))
    return found


class _Sought(NamedTuple):
    """What all candidates share; `sizes` of micro-batches, ascending."""

    request: Request
    sizes: list[int]
    shapes: Shapes
    counts: dict[str, Any]


def micro_batch_sizes(request: Request) -> list[int]:
    """Windows that a micro-batch may have: the divisors of a GPU's share of the batch, or the one size an
    override asks for."""
    training, gpus = request.recipe.training, request.gpus
    batch, asked = training.batch_size, training.micro_batch_size
    if batch % gpus:
        near = -(-batch // gpus) * gpus
        raise ConfigError(
            f"training.batch_size={batch} is not divisible by {gpus} GPUs; add training.batch_size={near}"
        )
    sizes = _divisors(batch // gpus)
    if not asked or not request.overridden("training.micro_batch_size"):
        return sizes
    if asked not in sizes:
        raise ConfigError(
            f"training.micro_batch_size={asked} does not divide the {batch // gpus} windows of each GPU: "
            f"possible are {', '.join(map(str, sizes))}"
        )
    return [asked]


def expert_parallel_sizes(recipe: Recipe, gpus: int) -> list[int]:
    """Divisors of both the GPUs and the experts, 1 for layers that look at the output of every route; of
    the recipe's own size only that if it is set."""
    channel, asked = recipe.model.channel, recipe.parallel.expert_parallel_size
    if not isinstance(channel, MoEChannelConfig):
        if asked > 1:
            raise ConfigError(f"parallel.expert_parallel_size={asked} needs model.channel.kind=moe")
        return [1]
    sizes = [n for n in _divisors(channel.experts) if not gpus % n]
    sizes = [1] if channel.opened else sizes
    if asked > 1:
        if asked not in sizes:
            raise ConfigError(
                f"parallel.expert_parallel_size={asked} must divide {gpus} GPUs and "
                f"model.channel.experts={channel.experts}: possible are {', '.join(map(str, sizes))}"
            )
        return [asked]
    return sizes


def refusal(recipe: Recipe, config: dict[str, Any], name: str, gpus: int) -> str:
    """Why `launch/train.py` would refuse to train so, or nothing."""
    precision = _precision(recipe, zero_stage(config))
    recipe = with_training(recipe, micro_batch_size=0)
    try:
        merged = merge_ds_config(config, recipe, plan_batches(recipe, gpus), precision, name)
        choose_placement(recipe, merged, name, gpus, 0)
    except ConfigError as error:
        return str(error)
    return ""


def _precision(recipe: Recipe, stage: int) -> torch.dtype:
    """What `launch/train.py` takes on a GPU, all of which have bf16."""
    return choose_precision(recipe.training.precision, stage, has_bf16=True)[0]


def recommended(found: list[Candidate]) -> Candidate | None:
    """The simplest of those that fit and need no longer than the fastest, up to `NEAR`."""
    fitting = [candidate for candidate in found if candidate.fits]
    longest = min(map(_seconds, fitting), default=0.0) * (1 + NEAR)
    return min((c for c in fitting if _seconds(c) <= longest), key=_complexity, default=None)


def _seconds(candidate: Candidate) -> float:
    assert candidate.time is not None
    return candidate.time.conservative


def _complexity(candidate: Candidate) -> tuple[int, int, bool, int]:
    """Stage, parts offloaded, whether it is not made for several nodes, expert-parallel size."""
    zero = candidate.zero
    offloaded = zero.optimizer_on_host + zero.parameters_on_host
    return (zero.stage, offloaded, not candidate.config.endswith(MULTINODE), candidate.ep)


def _planned(sought: _Sought, plain: Candidate) -> Candidate:
    """The candidate with the largest micro-batch that fits, or with the smallest if none does; recomputed
    if nothing else fits or the step is clearly shorter, since fewer micro-batches may be worth it."""
    again = sorted({sought.request.recipe.training.activation_checkpointing, True})
    tried = [_largest(sought, plain, checkpointing) for checkpointing in again]
    smallest = min(candidate.smallest for candidate in tried)
    best = tried[0] if tried[0].fits else tried[-1]
    if tried[-1].fits and _seconds(tried[-1]) * (1 + NEAR) < _seconds(best):
        best = tried[-1]
    return best._replace(smallest=smallest)


def _largest(sought: _Sought, plain: Candidate, checkpointing: bool) -> Candidate:
    recipe, gpus = sought.request.recipe, sought.request.gpus
    share = recipe.training.batch_size // gpus
    layout = Layout(gpus, plain.ep, marked=plain.ep > 1 or _marked(recipe))
    width = _precision(recipe, plain.zero.stage).itemsize
    own = with_training(recipe, activation_checkpointing=checkpointing)
    cases = [
        Case(own, sought.shapes, layout, plain.zero, windows, share // windows, width)
        for windows in reversed(sought.sizes)
    ]
    chosen = next((case for case in cases if _fits(sought.request, case)), cases[-1])
    fits, smallest = _fits(sought.request, chosen), estimate(cases[-1]).peak
    return _timed(sought, plain, chosen)._replace(fits=fits, smallest=smallest)


def _fits(request: Request, case: Case) -> bool:
    memory = estimate(case)
    return request.fits(memory.peak, memory.host)


def _spread(recipe: Recipe, ep: int) -> Recipe:
    """The recipe with its experts over `ep` processes."""
    if ep == 1:
        return recipe
    channel = recipe.model.channel.model_copy(update={"backend": "deepspeed"})
    model = recipe.model.model_copy(update={"channel": channel})
    parallel = recipe.parallel.model_copy(update={"expert_parallel_size": ep})
    return recipe.model_copy(update={"model": model, "parallel": parallel})


def _timed(sought: _Sought, plain: Candidate, case: Case) -> Candidate:
    transfers = step_transfers(case)
    work = step_work(case, sought.counts)
    time = step_time(case, work, transfers, sought.request.machine)
    return plain._replace(case=case, memory=estimate(case), transfers=tuple(transfers), time=time)


def with_training(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other values under `training`."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=fields)})


def _marked(recipe: Recipe) -> bool:
    return getattr(recipe.model.channel, "backend", "local") == "deepspeed"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def fitting_cards(candidate: Candidate, machine: Machine) -> list[float]:
    """Memory sizes of usual cards that hold the candidate with some micro-batch."""
    assert candidate.memory is not None
    needed = min(candidate.memory.peak, candidate.smallest)
    return [card for card in CARDS if needed <= machine.gpu.usable(card)]
