"""Heads: from the last vectors to the distribution of the next token."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import Part, by_name


class TiedHeadConfig(Part):
    """Logits through the embedding's own table."""

    kind: Literal["tied"] = "tied"
    chunk_tokens: int = Field(2048, ge=1)
    """Tokens whose logits exist at the same time while the loss is computed."""


class PreManifestHeadConfig(Part):
    """Tied logits after steps of refinement: the mean vector of the likeliest tokens moves the state
    before the distribution is taken, unless it is already sharp."""

    kind: Literal["pre_manifest"] = "pre_manifest"
    chunk_tokens: int = Field(2048, ge=1)
    """Tokens whose logits exist at the same time while the loss is computed."""
    steps: int = Field(1, ge=0)
    """Most refinements of a token; 0 is the tied head."""
    candidates: int = Field(64, ge=1)
    """Likeliest tokens whose mean vector a refinement adds (m)."""
    threshold: float = Field(0.3, ge=0, le=1)
    """Entropy of the distribution over ln(vocabulary) below which a token is refined no more."""
    deep_supervision: bool = False
    """While training also score the distributions before the last, for `losses.supervision_weight`."""

    @model_validator(mode="after")
    def _supervision_has_steps(self) -> "PreManifestHeadConfig":
        if self.deep_supervision and not self.steps:
            raise ValueError("deep_supervision has no effect with steps=0")
        return self


HeadConfig = Annotated[
    TiedHeadConfig | PreManifestHeadConfig, Field(discriminator="kind"), by_name("kind", "tied")
]
