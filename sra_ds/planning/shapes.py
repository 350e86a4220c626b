"""Parameters as DeepSpeed sees them: module by module in the order of the forward pass, and in the groups
of the optimizer.

Counted from the model on the meta device, so any size is free. A layout says how many processes share
them: dense parameters are replicated over all `world` processes, experts over `world / ep` of them.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import NamedTuple

from sra_ds.config import Recipe
from sra_ds.model.decay import decays
from sra_ds.model.language_model import build_model
from sra_ds.moe.experts import GroupedExperts

LARGEST_EXPERT_GROUP = 178_956_971
"""Elements after which DeepSpeed's `split_params_into_different_moe_groups_for_optimizer` starts the next
group of experts."""
ALIGNMENT = 2
"""Elements a partition of ZeRO-1/2 is padded to a multiple of, `nccl_start_alignment_factor`."""


class Weight(NamedTuple):
    """One parameter: elements of the whole model, whether experts share its first dimension, and whether
    weight decay applies."""

    numel: int
    expert: bool
    decayed: bool


class Shapes(NamedTuple):
    """`modules`: the parameters of each module that has some, in forward order; the first is the
    embedding, whose table the head reads again at the end."""

    modules: tuple[tuple[Weight, ...], ...]
    layers: int

    @property
    def weights(self) -> list[Weight]:
        """All parameters."""
        return [weight for module in self.modules for weight in module]


class Layout(NamedTuple):
    """`world` processes, every `ep` of which share one set of experts; `marked`: DeepSpeed keeps the
    experts in optimizer groups of their own (the deepspeed backend, whatever ep is)."""

    world: int
    ep: int = 1
    marked: bool = False

    @property
    def expert_world(self) -> int:
        """Processes that hold the same experts."""
        return self.world // self.ep

    def sharing(self, weight: Weight) -> int:
        """Processes that hold the same parameter, in a group DeepSpeed knows of."""
        return self.expert_world if weight.expert and self.marked else self.world

    def held(self, weight: Weight) -> int:
        """Elements of a parameter on one process before ZeRO partitions it."""
        return weight.numel // self.ep if weight.expert else weight.numel


class Group(NamedTuple):
    """One optimizer group: elements of its parameters on this process, and the processes that ZeRO
    partitions them over."""

    numels: tuple[int, ...]
    processes: int

    @property
    def padded(self) -> int:
        """Elements of the flat buffer of ZeRO-1/2, aligned to `ALIGNMENT` per process."""
        unit = ALIGNMENT * self.processes
        return -(-sum(self.numels) // unit) * unit

    @property
    def partition(self) -> int:
        """Elements of one process's part of it."""
        return self.padded // self.processes

    @property
    def touched(self) -> int:
        """Elements of whole parameters that overlap one partition, for the process with the most."""
        ends = [0, *accumulate(self.numels)]
        size, total, most = self.partition, ends[-1], 0
        for low in range(0, total, size):
            first = bisect_right(ends, low) - 1
            last = bisect_left(ends, min(low + size, total))
            most = max(most, ends[last] - ends[first])
        return most


def read_shapes(recipe: Recipe) -> Shapes:
    """The recipe's parameters."""
    model = build_model(recipe, "meta")
    modules = []
    for module in model.modules():
        weights = tuple(
            Weight(parameter.numel(), isinstance(module, GroupedExperts), decays(module, name))
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        )
        if weights:
            modules.append(weights)
    return Shapes(tuple(modules), recipe.model.layers)


def optimizer_groups(shapes: Shapes, layout: Layout) -> list[Group]:
    """The groups `training.engine.parameter_groups` makes, in no particular order."""
    groups = []
    for decayed in (True, False):
        chosen = [w for w in shapes.weights if w.decayed == decayed]
        dense = [w.numel for w in chosen if not (w.expert and layout.marked)]
        experts = [layout.held(w) for w in chosen if w.expert and layout.marked]
        groups += [Group(tuple(dense), layout.world)] if dense else []
        groups += [Group(part, layout.expert_world) for part in _split(experts)]
    return groups


def _split(numels: list[int]) -> list[tuple[int, ...]]:
    """Consecutive parameters of at most `LARGEST_EXPERT_GROUP` elements together."""
    parts: list[list[int]] = []
    for numel in numels:
        if not parts or sum(parts[-1]) + numel > LARGEST_EXPERT_GROUP:
            parts.append([])
        parts[-1].append(numel)
    return [tuple(part) for part in parts]
