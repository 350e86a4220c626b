"""What is asked of the planner: a recipe on a machine, from the options of the command line."""

import math
from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.errors import ConfigError
from sra_ds.planning.hardware import (
    EFFICIENCY,
    HOST_MEMORY,
    USABLE,
    choose_gpu,
    make_network,
    parse_memory,
)
from sra_ds.planning.step_time import Machine, make_machine


class Options(NamedTuple):
    """As on the command line of `tools/plan.py`; None is "not given"."""

    gpus: int = 1
    nodes: int = 1
    gpu: str | None = None
    gpu_memory: str | None = None
    host_memory: str | None = None
    intra_node: float | None = None
    inter_node: float | None = None
    efficiency: float = EFFICIENCY
    tokens: float | None = None
    price: float | None = None


class Request(NamedTuple):
    """What is asked: a recipe on `machine` with `memory` bytes per GPU and `host_memory` per node;
    `budget` of tokens to train on, if not the recipe's steps; `price` of a GPU hour; `overrides` are
    binding and repeated in the command."""

    recipe: Recipe
    machine: Machine
    memory: float
    host_memory: float
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

    def fits(self, device: int, host: int) -> bool:
        """Whether so many bytes of one process, on its GPU and in its node's memory, are there."""
        node = host * self.machine.network.gpus_per_node
        return device <= self.machine.gpu.usable(self.memory) and node <= self.host_memory * USABLE

    def overridden(self, key: str) -> bool:
        """Whether the recipe's key was given on the command line."""
        return any(override.split("=")[0] == key for override in self.overrides)


def make_request(
    recipe: Recipe, options: Options, recipe_name: str, overrides: tuple[str, ...]
) -> Request:
    """Raises `ConfigError` for options that contradict one another or are not finite."""
    for name, value in options._asdict().items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a finite number")
    given = options.gpu_memory
    gpu, memory = choose_gpu(options.gpu, None if given is None else parse_memory(given))
    links = (options.intra_node, options.inter_node)
    network = make_network(options.gpus, options.nodes, gpu, *links)
    host_memory = HOST_MEMORY * network.gpus_per_node
    if options.host_memory is not None:
        host_memory = parse_memory(options.host_memory, "--host-memory")
    return Request(
        recipe, make_machine(gpu, network, options.efficiency), memory, host_memory,
        options.tokens, options.price, recipe_name, overrides,
    )  # fmt: skip
