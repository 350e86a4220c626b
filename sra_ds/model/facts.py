"""What the parts of a model find out on the way, besides their vectors.

A part returns a dictionary. Most entries are measurements, detached scalars; those of `KINDS` and the
`penalties` mean more and are kept by kind. Letters: B sequences, T positions, I iterations, H heads,
C channels of fast weights.
"""

from typing import Any, NamedTuple

from torch import Tensor

from sra_ds.moe.routing import Routing

Facts = dict[str, Any]
KINDS = ("routing", "halting", "memory_state", "saturation", "penalties")


class Halting(NamedTuple):
    """How the iterations of a layer went, without gradient."""

    entropy_IBT: Tensor
    """Entropy of the weights over ln(visible positions), mean over heads; NaN at padding and where a
    token had stopped before."""
    iterations_BT: Tensor
    """Iterations of each token, the expected number where halting is soft; NaN at padding."""


class Collected(NamedTuple):
    """Everything the parts of a model found out in one pass."""

    routings: list[Routing]
    """One per routed layer, in order."""
    facts: dict[str, Tensor]
    """Measurements, named `embedding/`, `layer<i>/` or `head/<fact>`."""
    haltings: list[Halting]
    """One per layer that iterates, in order."""
    memory_states_HCC: list[Tensor]
    """One per layer with a persistent memory: its mean state after the windows, without gradient."""
    saturations: list[Tensor]
    """One per layer with ghosts: how little room its experts leave each other, without gradient."""
    penalties: dict[str, list[Tensor]]
    """Sums over real tokens that losses may add, with gradient, by name and in order of the layers."""


def merged(*found: Facts) -> Facts:
    """The facts of several parts as those of one."""
    penalties = {name: v for facts in found for name, v in facts.get("penalties", {}).items()}
    together = {name: value for facts in found for name, value in facts.items()}
    return {**together, "penalties": penalties} if penalties else together


def collect(found: dict[str, Facts]) -> Collected:
    """The facts of all parts, by where they come from, sorted into their kinds."""

    def of_kind(kind: str) -> list[Any]:
        return [facts[kind] for facts in found.values() if kind in facts]

    penalties: dict[str, list[Tensor]] = {}
    for own in of_kind("penalties"):
        for name, value in own.items():
            penalties.setdefault(name, []).append(value)
    measured = {
        f"{where}/{name}": value
        for where, facts in found.items()
        for name, value in facts.items()
        if name not in KINDS
    }
    return Collected(
        of_kind("routing"),
        measured,
        of_kind("halting"),
        of_kind("memory_state"),
        of_kind("saturation"),
        penalties,
    )


def sum_over_valid(x_BT: Tensor, valid_BT: Tensor | None) -> Tensor:
    """Sum over real tokens."""
    return x_BT.sum() if valid_BT is None else x_BT.where(valid_BT, 0.0).sum()
