"""Couplings: how the experts that a token goes to hear each other before their outputs are added up."""

from itertools import combinations
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import Part, by_name

MAX_HYPEREDGES = 1024
"""A token's weights of all its hyperedges are held at once."""


class NoCouplingConfig(Part):
    """Experts do not hear each other."""

    kind: Literal["none"] = "none"


class RoundsConfig(Part):
    """What couplings that exchange messages share."""

    rank: int = Field(32, ge=1)
    """Channels of a message; the maps of a round have this rank."""


class GraphCouplingConfig(RoundsConfig):
    """Gated messages between each two experts of a token."""

    kind: Literal["gnn"] = "gnn"
    rounds: int = Field(2, ge=1)


class HypergraphCouplingConfig(RoundsConfig):
    """Messages between the experts of a token that share a hyperedge."""

    kind: Literal["hgnn"] = "hgnn"
    rounds: int = Field(1, ge=1)
    incidence: Literal["all_pairs", "all_triplets", "all", "learned"] = "all_pairs"
    """Which sets of experts are hyperedges: each two, each three, the set of all (whose weight would
    cancel, so that it has none), or `hyperedges` sets that are learned."""
    hyperedges: int = Field(8, ge=1, le=MAX_HYPEREDGES)
    """How many sets are learned with incidence=learned."""
    members: int = Field(3, ge=2)
    """Experts in each learned set."""
    token_gate: bool = False
    """Weigh a hyperedge for each token by what its members say, too."""

    @model_validator(mode="after")
    def _learned_sets_have_an_effect(self) -> "HypergraphCouplingConfig":
        for name in ("hyperedges", "members"):
            default = HypergraphCouplingConfig.model_fields[name].default
            if self.incidence != "learned" and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect without incidence=learned")
        return self

    def sets(self, experts: int) -> list[tuple[int, ...]]:
        """The fixed hyperedges over so many experts, none where they are learned; in order of their last
        member, so that those of fewer experts come first."""
        sizes = {"all_pairs": 2, "all_triplets": 3, "all": experts}
        if self.incidence == "learned":
            return []
        found = combinations(range(experts), min(sizes[self.incidence], experts))
        return sorted(found, key=lambda own: own[::-1])


CouplingConfig = Annotated[
    NoCouplingConfig | GraphCouplingConfig | HypergraphCouplingConfig,
    Field(discriminator="kind"),
    by_name("kind", "none"),
]
