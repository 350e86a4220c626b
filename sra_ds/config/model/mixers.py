"""Mixers: the only parts where tokens meet."""

from typing import Annotated, Literal

from pydantic import Field

from sra_ds.config.base import Part, by_name


class HeadsConfig(Part):
    """What mixers with attention heads share."""

    heads: int = Field(8, ge=1)
    rope_theta: float | None = Field(10_000.0, gt=0)
    """Base of the rotary wavelengths; null: queries and keys are not rotated, and only the embedding may
    know of positions."""


class AttentionConfig(HeadsConfig):
    """Causal multi-head attention with rotary positions."""

    kind: Literal["attention"] = "attention"
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout on the attention weights."""


class ResonanceConfig(HeadsConfig):
    """Attention that refines its query with what it found, until the weights are sharp enough."""

    kind: Literal["resonance"] = "resonance"
    iterations: int = Field(3, ge=1)
    """Largest number of iterations T_max; 1 is attention without dropout."""
    halting: Literal["soft", "hard"] = "soft"
    """`soft`: a weighted mean over the iterations. `hard`: each token stops at the first iteration whose
    entropy is below `threshold`; queries that go on are gathered."""
    threshold: float = Field(0.3, ge=0, le=1)
    """Entropy of the weights over ln(visible positions), mean over heads, below which a token stops."""
    softness: float = Field(0.05, gt=0)
    """Width of the soft threshold, in the same unit."""
    kernel: Literal["flex", "chunked"] = "flex"
    """What computes whole windows on a GPU: torch's flex attention, a fused kernel, or a part of the
    queries at a time, as everywhere else."""


MixerConfig = Annotated[
    AttentionConfig | ResonanceConfig, Field(discriminator="kind"), by_name("kind", "attention")
]
