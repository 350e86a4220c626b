"""The language model: embedding -> blocks[mixer, channel] -> head, each a closed choice by `kind`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import BY_KIND, Part, by_name


class TokenEmbeddingConfig(Part):
    """A table of one vector per token, shared with the head."""

    kind: Literal["token"] = "token"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the embedded tokens."""


class AttentionConfig(Part):
    """Causal multi-head attention with rotary positions."""

    kind: Literal["attention"] = "attention"
    heads: int = Field(8, ge=1)
    rope_theta: float = Field(10_000.0, gt=0)
    """Base of the rotary wavelengths."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the attention weights."""


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


ChannelConfig = Annotated[
    DenseChannelConfig | MoEChannelConfig, Field(discriminator="kind"), BY_KIND
]


class TiedHeadConfig(Part):
    """Logits through the embedding's own table."""

    kind: Literal["tied"] = "tied"
    chunk_tokens: int = Field(2048, ge=1)
    """Tokens whose logits exist at the same time while the loss is computed."""


class ModelConfig(Part):
    """A pre-LN decoder. The vocabulary size belongs to `data.tokenizer`."""

    width: int = Field(512, ge=1)
    """Residual width D."""
    layers: int = Field(4, ge=1)
    embedding: Annotated[TokenEmbeddingConfig, BY_KIND] = TokenEmbeddingConfig()
    mixer: Annotated[AttentionConfig, BY_KIND] = AttentionConfig()
    channel: ChannelConfig
    head: Annotated[TiedHeadConfig, BY_KIND] = TiedHeadConfig()
    document_boundaries: bool = True
    """Tokens see their own document only, whatever the mixer."""

    @model_validator(mode="after")
    def _whole_heads(self) -> "ModelConfig":
        if self.width % (2 * self.mixer.heads):
            raise ValueError(
                f"width={self.width} must be a multiple of 2 x mixer.heads={2 * self.mixer.heads}"
            )
        if isinstance(self.channel, MoEChannelConfig):
            for name, size in (
                ("width", self.width),
                ("expert.hidden", self.channel.expert.hidden),
            ):
                if size % 8:
                    raise ValueError(f"{name}={size} must be a multiple of 8 for grouped products")
        return self
