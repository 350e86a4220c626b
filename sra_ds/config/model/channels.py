"""Channels: what happens to each token on its own."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import BY_KIND, Part, by_name
from sra_ds.config.model.couplings import (
    MAX_HYPEREDGES,
    CouplingConfig,
    HypergraphCouplingConfig,
    NoCouplingConfig,
)
from sra_ds.config.model.primes import DistinctPrimes
from sra_ds.config.model.routers import AnyRouterConfig, CosineRouterConfig, HashRouterConfig


class GeluConfig(Part):
    """Linear, tanh-GELU, dropout, Linear."""

    kind: Literal["gelu"] = "gelu"
    hidden: int = Field(ge=1)
    """Width F between the two projections."""
    bias: bool = True
    dropout: float = Field(0.1, ge=0, lt=1)


class SwigluConfig(Part):
    """SiLU(gate) * up, dropout, down; no biases."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int = Field(ge=1)
    """Width F of gate and up."""
    dropout: float = Field(0.1, ge=0, lt=1)


FeedForwardConfig = Annotated[
    GeluConfig | SwigluConfig, Field(discriminator="kind"), by_name("kind", "gelu")
]


class DenseChannelConfig(Part):
    """One feed-forward network for every token."""

    kind: Literal["dense"] = "dense"
    feed_forward: FeedForwardConfig


class GhostsConfig(Part):
    """Experts that are there from the start and chosen only once `training.ghosts` woke them."""

    count: int = Field(0, ge=0)
    """Ghosts of each layer; 0: none, whatever else is said of them."""
    background: bool = False
    """The next ghost to wake learns meanwhile what the experts leave of their block's update."""


class MoEChannelConfig(Part):
    """Routed experts: each token goes to `top_k` of `experts` networks."""

    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    top_k: int = Field(2, ge=1)
    """Experts per token at the end of training; `training.top_k_schedule` may start lower."""
    expert: FeedForwardConfig
    expert_kind: Literal["ffn", "block"] = "ffn"
    """`ffn`: an expert is a feed-forward network. `block`: attention and that network; all of them run on
    every token (top_k = experts), weighed by their gates."""
    expert_heads: int = Field(4, ge=1)
    """Attention heads of each expert with expert_kind=block."""
    coupling: CouplingConfig = NoCouplingConfig()
    """How the experts of a token hear each other before their outputs are added up."""
    compare_outputs: bool = False
    """Measure how alike the outputs of a token's experts are, for `losses.orthogonality_weight`."""
    ghosts: GhostsConfig = GhostsConfig()
    shared_expert: FeedForwardConfig | None = None
    """A feed-forward network every token passes besides its routed experts."""
    routed_scale: Literal["one", "sqrt_k", "k"] = "one"
    """What gates, which add up to 1, are multiplied by. `one`: k experts are averaged; `k`: they add up
    as the parts of one network that is k times as wide; `sqrt_k`: k unlike outputs are together as large
    as one. A schedule of k moves it."""
    router: AnyRouterConfig = CosineRouterConfig()
    backend: Literal["local", "deepspeed", "megablocks", "auto"] = "local"
    """What runs the experts while training; all give the same result, and none drops a token. `local`:
    grouped products in plain torch. `deepspeed`: its expert parallelism (AutoEP), needed for
    `parallel.expert_parallel_size` > 1. `megablocks`: its dropless layer, after `make megablocks`.
    `auto`: the fastest here of those installed, measured once."""

    @model_validator(mode="after")
    def _enough_experts(self) -> "MoEChannelConfig":
        if self.top_k > self.experts:
            raise ValueError(f"top_k={self.top_k} exceeds experts={self.experts}")
        if self.compare_outputs and self.top_k == 1:
            raise ValueError("compare_outputs needs top_k of at least 2: outputs to compare")
        return self

    @model_validator(mode="after")
    def _outputs_are_there(self) -> "MoEChannelConfig":
        asked = {
            "coupling": self.coupling.kind != "none",
            "compare_outputs": self.compare_outputs,
            "ghosts.count": self.ghosts.count > 0,
            "expert_kind=block": self.expert_kind == "block",
        }
        for name, wanted in asked.items():
            if wanted and self.backend != "local":
                raise ValueError(
                    f"{name} needs the output of every route, but backend={self.backend} may add them up "
                    "inside: use backend=local"
                )
        return self

    @model_validator(mode="after")
    def _hyperedges_fit(self) -> "MoEChannelConfig":
        coupling = self.coupling
        if not isinstance(coupling, HypergraphCouplingConfig):
            return self
        experts = self.experts + self.ghosts.count
        count = len(coupling.sets(experts))
        if count > MAX_HYPEREDGES:
            raise ValueError(
                f"coupling.incidence={coupling.incidence} of {experts} experts makes {count} "
                f"hyperedges, more than {MAX_HYPEREDGES}: use incidence=learned"
            )
        if coupling.incidence == "learned" and coupling.members > self.experts:
            raise ValueError(f"coupling.members={coupling.members} exceeds experts={self.experts}")
        return self

    @model_validator(mode="after")
    def _blocks_all_run(self) -> "MoEChannelConfig":
        if self.expert_kind == "ffn":
            if self.expert_heads != MoEChannelConfig.model_fields["expert_heads"].default:
                raise ValueError("expert_heads has no effect without expert_kind=block")
            return self
        if self.top_k != self.experts:
            raise ValueError(
                f"expert_kind=block runs all experts: top_k={self.top_k} must be experts={self.experts}"
            )
        if self.ghosts.count:
            raise ValueError(
                "ghosts need expert_kind=ffn: nothing is chosen among blocks, so a ghost would have no "
                "place to take"
            )
        return self

    @model_validator(mode="after")
    def _ghosts_can_be_chosen(self) -> "MoEChannelConfig":
        if not self.ghosts.count:
            return self
        router = self.router
        if isinstance(router, HashRouterConfig):
            raise ValueError("ghosts need a router with scores, not router.kind=hash")
        if isinstance(router, CosineRouterConfig) and router.temperature == "per_expert":
            raise ValueError(
                "ghosts need one temperature for all experts, not temperature=per_expert"
            )
        if self.top_k < 2:
            raise ValueError("ghosts need top_k of at least 2: outputs to compare")
        return self

    @property
    def opened(self) -> bool:
        """Whether the layer needs the output of every route, and not their sum alone."""
        looked_at = self.compare_outputs or self.ghosts.count > 0 or self.coupling.kind != "none"
        return looked_at or self.expert_kind == "block"


class PrimeMaskedChannelConfig(Part):
    """One feed-forward network whose matrices are sparse: a weight from channel j to channel i lives
    where a prime divides i - j."""

    kind: Literal["prime_masked"] = "prime_masked"
    feed_forward: FeedForwardConfig
    primes: DistinctPrimes = (7, 11, 13, 17, 19)
    pattern: Literal["prime", "random"] = "prime"
    """`random`: a control, as many weights in each row as the primes give it, at random places."""
    pattern_seed: int = Field(0, ge=0)
    """Draws the random places, with each matrix's name; not the run's seed, so that a run can start from
    another's weights."""
    storage: Literal["masked", "blocks"] = "masked"
    """`masked`: whole matrices with zeros. `blocks`: live weights alone, in products of dense blocks;
    the same result from less memory and, for wide layers, in less time."""

    @model_validator(mode="after")
    def _blocks_need_a_pattern(self) -> "PrimeMaskedChannelConfig":
        if self.pattern == "random" and self.storage == "blocks":
            raise ValueError("storage=blocks needs pattern=prime: a random mask has no blocks")
        return self


ChannelConfig = Annotated[
    DenseChannelConfig | MoEChannelConfig | PrimeMaskedChannelConfig,
    Field(discriminator="kind"),
    BY_KIND,
]
