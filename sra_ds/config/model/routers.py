"""Routers: which experts a token goes to."""

from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import Part, by_name

GateForm = Literal["selected", "all", "straight_through"]


class RouterConfig(Part):
    """What every router shares."""

    gate: GateForm = "all"
    """`selected`: softmax over the k chosen (v1). `all`: softmax over all experts, renormalised for
    k > 1, the bare probability for k = 1 (v2). `straight_through`: as `selected`, but k = 1 passes a
    gate of 1 with the gradient of its probability."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on the selection scores while training."""


class CosineRouterConfig(RouterConfig):
    """Scores are cosines between token and anchors, times a temperature."""

    kind: Literal["cosine"] = "cosine"
    temperature: Literal["none", "fixed", "global", "per_expert"] = "global"
    """`none`: 1; `fixed`: a constant a controller may ramp; the others are learned."""
    initial_temperature: float = Field(10.0, gt=0)
    """Start of a learned temperature, value of a fixed one."""
    anchors: Literal["orthogonal", "kaiming", "data"] = "orthogonal"
    """Initial anchors; `data` takes normalised router inputs of the first batch."""


class LinearRouterConfig(RouterConfig):
    """Scores are a learned linear map of the token."""

    kind: Literal["linear"] = "linear"
    bias: bool = False


class RandomRouterConfig(RouterConfig):
    """Control: cosine scores against frozen random anchors."""

    kind: Literal["random"] = "random"
    temperature: float = Field(10.0, gt=0)


class HashRouterConfig(Part):
    """Control: experts are a fixed hash of the token id; gates are 1/k."""

    kind: Literal["hash"] = "hash"


AnyRouterConfig = Annotated[
    CosineRouterConfig | LinearRouterConfig | RandomRouterConfig | HashRouterConfig,
    Field(discriminator="kind"),
    by_name("kind", "cosine"),
]
