"""Every shipped DeepSpeed configuration and expert-parallel size for a recipe on a machine: what fits,
what it sends, how long a step takes; and which to start, with what command.

For each pair the largest micro-batch that fits is taken, with activation checkpointing if none fits
without. Recommended is the pair whose step is shortest when nothing overlaps. Expert parallelism is tried
over divisors of the processes and the experts; precision is bf16 unless the recipe or stage 0 forbid it.
"""

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
from sra_ds.planning.shapes import Layout, Shapes, read_shapes
from sra_ds.planning.step_time import Machine, StepTime, step_time, step_work
from sra_ds.planning.zero import Zero, read_zero, require_planned
from sra_ds.training.ds_config import merge_ds_config, plan_batches, zero_stage
from sra_ds.training.placement import choose_placement

LARGEST_EP = 64
SECONDS_PER_DAY = 86_400


class Request(NamedTuple):
    """What is asked: a recipe on `machine` with `memory` bytes per GPU; `budget` of tokens to train on,
    if not the recipe's steps; `price` of a GPU hour; `overrides` are repeated in the command."""

    recipe: Recipe
    machine: Machine
    memory: float
    budget: float | None = None
    price: float | None = None
    recipe_name: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def step_tokens(self) -> int:
        """Tokens of a step on all GPUs."""
        return self.recipe.training.batch_size * self.recipe.data.sequence_length

    @property
    def tokens(self) -> float:
        """Tokens of the whole run."""
        if self.budget is not None:
            return self.budget
        return float(self.recipe.training.steps * self.step_tokens)

    @property
    def gpus(self) -> int:
        """All of them."""
        network = self.machine.network
        return network.nodes * network.gpus_per_node


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


def candidates(request: Request, configs: dict[str, dict[str, Any]]) -> list[Candidate]:
    """All pairs of a configuration (by file name) and an expert-parallel size; raises `ConfigError` for a
    batch that does not divide over the GPUs."""
    recipe, gpus = request.recipe, request.gpus
    batch = recipe.training.batch_size
    if batch % gpus:
        near = -(-batch // gpus) * gpus
        raise ConfigError(
            f"training.batch_size={batch} is not divisible by {gpus} GPUs; add training.batch_size={near}"
        )
    shapes, counts = read_shapes(recipe), count_parameters(build_model(recipe, "meta"))
    found = []
    for name, config in configs.items():
        require_planned(config, name)
        zero = read_zero(config)
        for ep in expert_parallel_sizes(recipe, gpus):
            reason = refusal(_spread(recipe, ep), config, name, gpus)
            plain = Candidate(name, zero, ep, reason)
            found.append(plain if reason else _largest(request, plain, shapes, counts))
    return found


def expert_parallel_sizes(recipe: Recipe, gpus: int) -> list[int]:
    """Divisors of both the GPUs and the experts; of the recipe's own size only that if it is set."""
    channel, asked = recipe.model.channel, recipe.parallel.expert_parallel_size
    if not isinstance(channel, MoEChannelConfig):
        if asked > 1:
            raise ConfigError(f"parallel.expert_parallel_size={asked} needs model.channel.kind=moe")
        return [1]
    sizes = [n for n in range(1, min(gpus, LARGEST_EP) + 1) if not gpus % n]
    sizes = [n for n in sizes if not channel.experts % n]
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
    precision = torch.float32 if _width(recipe, zero_stage(config)) == 4 else torch.bfloat16
    recipe = with_training(recipe, micro_batch_size=0)
    try:
        merged = merge_ds_config(config, recipe, plan_batches(recipe, gpus), precision, name)
        choose_placement(recipe, merged, name, gpus, 0)
    except ConfigError as error:
        return str(error)
    return ""


def _width(recipe: Recipe, stage: int) -> int:
    """Bytes of a number: 2 of bf16, unless the recipe says otherwise or the stage has no masters."""
    asked = recipe.training.precision
    return 4 if asked == "fp32" or (stage == 0 and asked == "auto") else 2


def recommended(found: list[Candidate]) -> Candidate | None:
    """The one that fits with the shortest step; of equals the lowest stage without offloading."""
    fitting = [candidate for candidate in found if candidate.fits]
    return min(fitting, key=_order) if fitting else None


def _order(candidate: Candidate) -> tuple[float, int, int]:
    assert candidate.time is not None
    return (candidate.time.conservative, candidate.zero.stage, candidate.ep)


def _largest(
    request: Request, plain: Candidate, shapes: Shapes, counts: dict[str, Any]
) -> Candidate:
    """The candidate with the largest micro-batch that fits, or with one window if none does."""
    recipe, gpus = request.recipe, request.gpus
    share = recipe.training.batch_size // gpus
    asked = recipe.training.micro_batch_size
    sizes = [asked] if asked and not share % asked else _divisors(share)
    layout = Layout(gpus, plain.ep, marked=plain.ep > 1 or _marked(recipe))
    width = _width(recipe, plain.zero.stage)
    usable = request.machine.gpu.usable(request.memory)
    for checkpointing in sorted({recipe.training.activation_checkpointing, True}):
        own = with_training(recipe, activation_checkpointing=checkpointing)
        for windows in reversed(sizes):
            case = Case(own, shapes, layout, plain.zero, windows, share // windows, width)
            memory = estimate(case)
            if memory.peak <= usable:
                return _timed(request, plain, case, memory, counts)._replace(fits=True)
    return _timed(request, plain, case, memory, counts)


def _spread(recipe: Recipe, ep: int) -> Recipe:
    """The recipe with its experts over `ep` processes."""
    if ep == 1:
        return recipe
    channel = recipe.model.channel.model_copy(update={"backend": "deepspeed"})
    model = recipe.model.model_copy(update={"channel": channel})
    parallel = recipe.parallel.model_copy(update={"expert_parallel_size": ep})
    return recipe.model_copy(update={"model": model, "parallel": parallel})


def _timed(
    request: Request, plain: Candidate, case: Case, memory: Memory, counts: dict[str, Any]
) -> Candidate:
    transfers = step_transfers(case)
    time = step_time(case, step_work(case, counts), transfers, request.machine)
    return plain._replace(case=case, memory=memory, transfers=tuple(transfers), time=time)


def with_training(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other values under `training`."""
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=fields)})


def _marked(recipe: Recipe) -> bool:
    return getattr(recipe.model.channel, "backend", "local") == "deepspeed"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def fitting_cards(candidate: Candidate, machine: Machine) -> list[float]:
    """Memory sizes of usual cards that hold the candidate as it is."""
    assert candidate.memory is not None
    return [card for card in CARDS if candidate.memory.peak <= machine.gpu.usable(card)]
