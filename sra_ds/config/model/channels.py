"""Channels: what happens to each token on its own."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import BY_KIND, Part, by_name
from sra_ds.config.model.primes import DistinctPrimes
from sra_ds.config.model.routers import AnyRouterConfig, CosineRouterConfig


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


class MoEChannelConfig(Part):
    """Routed experts: each token goes to `top_k` of `experts` feed-forward networks."""

    kind: Literal["moe"] = "moe"
    experts: int = Field(ge=1)
    top_k: int = Field(2, ge=1)
    """Experts per token at the end of training; `training.top_k_schedule` may start lower."""
    expert: FeedForwardConfig
    shared_expert: FeedForwardConfig | None = None
    """A feed-forward network every token passes besides its routed experts."""
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
        return self


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
