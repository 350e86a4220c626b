"""Memories: what a block adds to its channel from beyond the token at hand."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sra_ds.config.base import BY_KIND, Part


class NoMemoryConfig(Part):
    """The channel stands alone."""

    kind: Literal["none"] = "none"


class StaticMemoryConfig(Part):
    """A table of slots with unit keys; what a token's best slots hold changes a low-rank part of the
    channel's weights for this token."""

    kind: Literal["static"] = "static"
    slots: int = Field(1000, ge=1)
    key_width: int = Field(128, ge=1)
    value_width: int = Field(64, ge=1)
    best: int = Field(32, ge=1)
    """Slots a token reads."""
    temperature: float = Field(20.0, gt=0)
    """Start of the learned factor on the cosines of token and keys."""
    rank: int = Field(8, ge=1)
    """Rank of the change of weights."""

    @model_validator(mode="after")
    def _enough_slots(self) -> "StaticMemoryConfig":
        if self.best > self.slots:
            raise ValueError(f"best={self.best} exceeds slots={self.slots}")
        return self


class FastWeightsConfig(Part):
    """What memories of fast weights share."""

    heads: int = Field(4, ge=1)
    head_width: int = Field(32, ge=1)
    """Channels of keys and of values."""
    decay: float = Field(0.99, gt=0, lt=1)
    """Start of the learned share of the state that a token keeps."""
    kernel: Literal["chunked", "fla"] = "chunked"
    """What computes it on a GPU: matrix products, as everywhere else, or the fused kernel of
    flash-linear-attention, which has to be installed."""


class FastMemoryConfig(FastWeightsConfig):
    """Fast weights: a matrix per document and head, written token by token by the delta rule."""

    kind: Literal["fast"] = "fast"


class PersistentMemoryConfig(FastWeightsConfig):
    """Fast weights whose state at a document's start is a memory that a controller, never the model,
    writes after each step or scored segment."""

    kind: Literal["persistent"] = "persistent"
    write_rate: float = Field(0.1, gt=0, le=1)
    """Share of the memory that one write replaces by the mean state at the ends of windows."""


MemoryConfig = Annotated[
    NoMemoryConfig | StaticMemoryConfig | FastMemoryConfig | PersistentMemoryConfig,
    Field(discriminator="kind"),
    BY_KIND,
]
